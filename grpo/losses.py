"""Losses: logprobs [N] -> one loss.

    loss = sum over tokens n of weight_n * (correction_n * l_n + beta * kl_n) / denominator - entropy_coef * entropy

A loss is the function l (the cost of one token) and `per`, the unit that it is averaged over. With

    ratio_n = exp(logp_n - old_n)                                    importance_sampling_level token
    ratio_n = exp(mean of logp - old over n's completion)            importance_sampling_level sequence (GSPO)

the denominator counts over all ranks and the whole mini-batch, so the gradient does not depend on micro-batches,
packing or rank count:

    per            weight_n          denominator
    token          1                 tokens                               (DAPO, arXiv 2503.14476, eq. 8)
    sequence       1 / own length    completions                          (DeepSeekMath, arXiv 2402.03300, eq. 3)
    sequence_sum   1                 completions                          (LUSPO, arXiv 2602.05261)
    max_length     1                 completions x max_completion_length  (Dr. GRPO, arXiv 2503.20783)

A new loss names the tensors [N] and the settings that it needs, as a reward names columns:

    @register_loss("mine", per="token")
    def mine(ratio, advantages, *, epsilon, tau=1.0):
        return -ratio.clamp(max=1 + epsilon) * advantages / tau

Tensors: ratio, log_ratio (per token), sequence_log_ratio (summed over n's completion), logprobs, advantages, and
sequence_log_correction (log of the correction of n's completion; 0 without a correction). A loss that names the last
one applies the correction itself, and its terms are not multiplied by it. sequence_mean is a function: [N] -> [N], the
mean over n's completion. Settings: the keys of the config's `objective`, and your own in objective.loss_kwargs.
grpo/objectives/ has further losses, and the corrections.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo.errors import ConfigError
from grpo.kl import kl_estimate
from grpo.packing import PackedBatch
from grpo.registry import Check, Registry, call_with_supported_args, check_arguments

MAX_LOG_RATIO = 20.0
"""Log-ratios of the policy are capped at 20 before exp: a ratio above e^20 counts as e^20, and its token has no
gradient. This bounds the step where the unclipped ratio is used (A < 0 without delta), and keeps float32 finite."""


@dataclass(frozen=True)
class Counts:
    """Denominators, summed over all ranks and the whole mini-batch. Masked completions do not count."""

    tokens: float
    sequences: float
    max_completion_length: int

    def denominator(self, per: str) -> float:
        by = {
            "token": self.tokens,
            "sequence": self.sequences,
            "sequence_sum": self.sequences,
            "max_length": self.sequences * self.max_completion_length,
        }
        return max(1.0, by[per])


@dataclass(frozen=True)
class LossFunction:
    """One loss. Made by @register_loss."""

    term: Callable[..., Tensor]
    """tensors [N] and settings, by name -> [N]: the cost of each token"""
    per: str
    """token, sequence, sequence_sum or max_length: the table at the top of the file"""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """Values of config keys that are null: {"importance_sampling_level": "sequence"} for gspo."""
    clips: Callable[..., Tensor] | None = None
    """tensors and settings, by name -> [N] bool, for the log: tokens without a gradient because of the clip"""


PER = ("token", "sequence", "sequence_sum", "max_length")
SEQUENCE_CORRECTION = "sequence_log_correction"
TENSORS = ("ratio", "log_ratio", "sequence_log_ratio", "sequence_mean", "logprobs", "advantages", SEQUENCE_CORRECTION)
LOSSES: Registry[LossFunction] = Registry("loss", "grpo.objectives", key="objective.loss_type")


def register_loss(
    name: str,
    *,
    per: str,
    clips: Callable[..., Tensor] | None = None,
    check: Check | None = None,
    **implied: Any,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Return a decorator that registers the function below it as the loss called `name` (see LossFunction, "
    "Registry)."""

    def add(term: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if per not in PER:
            raise ValueError(f"loss '{name}': per is '{per}', needs one of {', '.join(PER)}")
        LOSSES.add(name, LossFunction(term, per, implied, clips), source=term, check=check)
        return term

    return add


def find_loss(name: str) -> LossFunction:
    """Return the loss called `name`, or the one that `module:function` or `path/file.py:function` points to."""
    found: Any = LOSSES.get(name)
    if not isinstance(found, LossFunction):
        raise ConfigError(f"objective.loss_type '{name}' is not a loss: put @register_loss above it")
    return found


def check_loss(config: Any) -> None:
    """Raise ConfigError if objective.loss_type does not exist, lacks an argument, or cannot work with the config."""
    settings = vars(config.objective)
    name, kwargs = settings["loss_type"], settings.get("loss_kwargs", {})
    loss, label = find_loss(name), f"objective.loss_type '{name}'"
    offered, given = (*TENSORS, *settings), f"the tensors {', '.join(TENSORS)}, and the keys of objective"
    check_arguments(label, loss.term, offered, kwargs, "objective.loss_kwargs", given)
    if loss.clips is not None:
        check_arguments(label, loss.clips, (*offered, *kwargs), {}, "objective.loss_kwargs", given)
    LOSSES.check(name, config)


def unused_settings(objective: Any, changed: Iterable[str]) -> list[str]:
    """Return those of the `changed` keys of `objective` that other losses use, but its loss_type does not."""

    def named(loss: LossFunction) -> set[str]:
        functions = [loss.term] if loss.clips is None else [loss.term, loss.clips]
        return {name for function in functions for name in inspect.signature(function).parameters}

    used = named(find_loss(objective.loss_type))
    of_losses = {name for known in LOSSES.names() for name in named(LOSSES.get(known))} & set(vars(objective))
    uses_ratio = "ratio" in used or (
        objective.beta > 0 and objective.use_bias_correction_kl and not objective.kl_in_reward
    )
    unused = of_losses - used | (set() if uses_ratio else {"importance_sampling_level"})
    return [name for name in changed if name in unused]


def clipped_by_ppo(ratio: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float | None) -> Tensor:
    high = epsilon if epsilon_high is None else epsilon_high
    return ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))


def check_clip(config: Any) -> None:
    """Raise ConfigError for an objective.delta that the upper clip makes useless."""
    objective = config.objective
    high = objective.epsilon if objective.epsilon_high is None else objective.epsilon_high
    if objective.delta is not None and objective.delta <= 1 + high:
        raise ConfigError(
            f"objective.delta is {objective.delta}, needs to be above 1 + epsilon_high = {1 + high}: below, the clip "
            "acts first"
        )


@register_loss("grpo", per="sequence", clips=clipped_by_ppo, check=check_clip)
@register_loss("dapo", per="token", clips=clipped_by_ppo, check=check_clip)
@register_loss("bnpo", per="token", clips=clipped_by_ppo, check=check_clip)  # arXiv 2506.02864; TRL: per micro-batch
@register_loss("dr_grpo", per="max_length", clips=clipped_by_ppo, check=check_clip)
def clipped(
    ratio: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float | None, delta: float | None
) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)          (PPO, arXiv 1707.06347, eq. 7)

    `delta` caps the unclipped ratio: a bound where A < 0, which the clip leaves open above (dual-clip PPO, arXiv
    1912.09729, eq. 5; INTELLECT-2, arXiv 2505.07291).
    """
    high = epsilon if epsilon_high is None else epsilon_high
    capped = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(capped * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)


@dataclass
class LossOutput:
    """The share of one batch in the loss: already divided by counts over all ranks, so batches and ranks add up."""

    loss: Tensor
    """with a gradient"""
    kl: Tensor
    """plain sum over the tokens that count, for the log"""
    clipped: Tensor
    """as kl"""


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    reference_logprobs_N: Tensor | None,
    batch: PackedBatch,
    function: LossFunction,
    counts: Counts,
    settings: Mapping[str, Any],
    *,
    entropies_N: Tensor | None = None,
    correction_N: Tensor | None = None,
    sequence_log_correction_N: Tensor | None = None,
    mask_N: Tensor | None = None,
) -> LossOutput:
    """Compute the formula at the top of the file for one batch.

    Args:
        logprobs_N: under the policy, with a gradient. old_logprobs_N: under the policy before this step.
        reference_logprobs_N: under the reference; None = no KL term.
        settings: the keys of the config's `objective`.
        entropies_N: with a gradient; needed where entropy_coef is not 0.
        correction_N: weights of the policy term, for tokens that another policy drew (grpo/objectives/correction.py).
        sequence_log_correction_N: the log of the weight of the whole completion.
        mask_N: 0 where the policy term does not count (`policy_term_mask`).
    """
    log_ratio = (logprobs_N - old_logprobs_N).clamp(max=MAX_LOG_RATIO)
    sequence_log_ratio = per_sequence(log_ratio, batch)
    level = settings.get("importance_sampling_level") or function.implied.get("importance_sampling_level", "token")
    lengths_N = batch.lengths_S[batch.sequence_N]
    ratio = torch.exp(log_ratio if level == "token" else sequence_log_ratio / lengths_N)
    offered = {
        **settings,
        **settings.get("loss_kwargs", {}),
        "ratio": ratio,
        "log_ratio": log_ratio,
        "sequence_log_ratio": sequence_log_ratio,
        "sequence_mean": lambda values_N: per_sequence(values_N, batch) / lengths_N,
        "logprobs": logprobs_N,
        "advantages": batch.advantages_N,
    }
    applies_correction = SEQUENCE_CORRECTION in inspect.signature(function.term).parameters
    if applies_correction:
        found = sequence_log_correction_N
        offered[SEQUENCE_CORRECTION] = torch.zeros_like(log_ratio) if found is None else found
    per_token = call_with_supported_args(function.term, offered)
    if correction_N is not None and not applies_correction:
        per_token = per_token * correction_N
    if mask_N is not None:
        per_token = per_token * mask_N
    counted = (batch.weights_N != 0).to(per_token.dtype)
    kl_sum = torch.zeros((), device=per_token.device)
    if reference_logprobs_N is not None:
        kl = kl_estimate(logprobs_N, reference_logprobs_N, settings.get("kl_estimator", "k3"))
        kl_sum = (kl.detach() * counted).sum()
        per_token = per_token + settings["beta"] * (kl * ratio if settings.get("use_bias_correction_kl") else kl)
    weights = batch.weights_N / lengths_N if function.per == "sequence" else batch.weights_N
    loss = (per_token * weights).sum() / counts.denominator(function.per)
    if entropies_N is not None and settings.get("entropy_coef"):
        loss = loss - settings["entropy_coef"] * (entropies_N * batch.weights_N).sum() / max(1.0, counts.tokens)
    clipped_sum = torch.zeros_like(kl_sum)
    if function.clips is not None:
        clipped_sum = (call_with_supported_args(function.clips, offered) * counted).sum()
    return LossOutput(loss, kl_sum, clipped_sum)


def per_sequence(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """[N] -> [N]: the sum over the completion that each token belongs to."""
    sums_S = torch.zeros(len(batch.lengths_S), dtype=values_N.dtype, device=values_N.device)
    return sums_S.index_add(0, batch.sequence_N, values_N)[batch.sequence_N]
