"""The clipped objective, its published variants, and the KL estimators: logprobs [N] -> a loss as a token sum.

Every objective is  loss = sum over tokens of weight_n * (l_n + beta * kl_n) / denominator,  with

    ratio_n = exp(logp_n - old_n)
    l_n     = -min(ratio_n * A_n, clip(ratio_n, 1 - epsilon, 1 + epsilon_high) * A_n)      (PPO, arXiv 1707.06347, eq. 7)

Variants differ only in how a token is weighted and what is divided by. Both are counted over all ranks and the whole
mini-batch, so the gradient does not depend on micro-batches, packing or rank count:

    grpo     weight 1 / own length        denominator: sequences       (DeepSeekMath, arXiv 2402.03300, eq. 3)
    dapo     weight 1                     denominator: tokens          (DAPO, arXiv 2503.14476, eq. 8)
    bnpo     weight 1                     denominator: tokens          (as dapo; TRL counts tokens per micro-batch)
    dr_grpo  weight 1                     denominator: sequences x max_completion_length   (arXiv 2503.20783)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.packing import PackedBatch
from grpo.registry import Registry

LIMIT = 20.0
"""Log-ratios are clamped to +-20 before exp, which would overflow."""


@dataclass(frozen=True)
class Counts:
    """What an objective may divide by, summed over all ranks and the whole mini-batch."""

    tokens: float
    sequences: float
    max_completion_length: int


@dataclass(frozen=True)
class Objective:
    """One variant: how tokens are weighted, and what their sum is divided by."""

    token_weights: Callable[[PackedBatch], Tensor]
    """batch -> [N]"""
    denominator: Callable[[Counts], float]


OBJECTIVES: Registry[Objective] = Registry("objective")
register_objective = OBJECTIVES.register


def _equal(batch: PackedBatch) -> Tensor:
    return batch.weights_N


def _by_length(batch: PackedBatch) -> Tensor:
    return batch.weights_N / batch.lengths_S[batch.sequence_N]


register_objective("grpo")(Objective(_by_length, lambda counts: counts.sequences))
register_objective("dapo")(Objective(_equal, lambda counts: counts.tokens))
register_objective("bnpo")(Objective(_equal, lambda counts: counts.tokens))
register_objective("dr_grpo")(Objective(_equal, lambda counts: counts.sequences * counts.max_completion_length))


@dataclass
class LossSums:
    """Sums over the tokens of one batch. Only `loss` carries a gradient; the caller divides it by the denominator."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor


def clipped_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    reference_logprobs_N: Tensor | None,
    batch: PackedBatch,
    objective: Objective,
    *,
    beta: float,
    epsilon: float,
    epsilon_high: float | None = None,
    kl_estimator: str = "k3",
) -> LossSums:
    """The formula at the top of the file, as a sum. reference_logprobs_N None = no KL term.

    `kl` and `clipped` are plain token sums over the tokens that count (weight not 0), for the logs.
    """
    ratio = torch.exp((logprobs_N - old_logprobs_N).clamp(-LIMIT, LIMIT))
    advantage = batch.advantages_N
    high = epsilon if epsilon_high is None else epsilon_high
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - epsilon, 1 + high) * advantage
    per_token = -torch.minimum(unclipped, clipped)
    counted = (batch.weights_N != 0).to(per_token.dtype)
    kl_sum = torch.zeros((), device=per_token.device)
    if reference_logprobs_N is not None:
        kl = kl_estimate(logprobs_N, reference_logprobs_N, kl_estimator)
        per_token = per_token + beta * kl
        kl_sum = (kl.detach() * counted).sum()
    is_clipped = ((ratio < 1 - epsilon) & (advantage < 0)) | ((ratio > 1 + high) & (advantage > 0))
    return LossSums(
        loss=(per_token * objective.token_weights(batch)).sum(),
        kl=kl_sum,
        clipped=(is_clipped * counted).sum(),
    )


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimates of KL(policy || reference) from tokens drawn from the policy (Schulman, joschu.net/blog/kl-approx).

    with d = reference - logprobs:   k1 = -d     k2 = d^2 / 2     k3 = exp(d) - d - 1
    """
    difference = (reference - logprobs).clamp(-LIMIT, LIMIT)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference**2 / 2
    return torch.exp(difference) - difference - 1
