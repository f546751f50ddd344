"""The objective: logprobs [N] -> one loss, for every published variant.

    loss = sum over tokens n of  weight_n * (correction_n * l_n + beta * kl_n) / denominator  -  entropy_coef * mean entropy

A variant is the function l (what one token costs) and what `per` it is averaged over. With

    ratio_n = exp(logp_n - old_n)                                    importance_sampling_level token
    ratio_n = exp(mean of logp - old over n's completion)            importance_sampling_level sequence (GSPO)

the denominator counts over all ranks and the whole mini-batch, so the gradient does not depend on micro-batches,
packing or rank count:

    per            weight_n          denominator
    token          1                 tokens                               (DAPO, arXiv 2503.14476, eq. 8)
    sequence       1 / own length    completions                          (DeepSeekMath, arXiv 2402.03300, eq. 3)
    sequence_sum   1                 completions                          (LUSPO, arXiv 2602.05261)
    max_length     1                 completions x max_completion_length  (Dr. GRPO, arXiv 2503.20783)

A new variant names the tensors [N] and the settings (keys of the config's `objective`) that it needs, as a reward names columns:

    @register_objective("mine", per="token")
    def mine(ratio, advantages, *, epsilon):
        return -ratio.clamp(max=1 + epsilon) * advantages

Tensors on offer: ratio, log_ratio (per token), sequence_log_ratio (summed over n's completion), logprobs, advantages.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo.errors import ConfigError
from grpo.kl import LIMIT, kl_estimate
from grpo.packing import PackedBatch
from grpo.registry import Registry


@dataclass(frozen=True)
class Counts:
    """What a loss may be divided by, summed over all ranks and the whole mini-batch. Masked completions do not count."""

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
class Objective:
    """One variant. Made by @register_objective."""

    term: Callable[..., Tensor]
    """tensors [N] and settings, by name -> [N]: what each token costs"""
    per: str
    """token, sequence, sequence_sum or max_length: the table at the top of the file"""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """What config keys mean that are left null: {"importance_sampling_level": "sequence"} for gspo."""
    clips: Callable[..., Tensor] | None = None
    """tensors and settings, by name -> [N] bool, for the log: whose gradient the clip took away"""


PER = ("token", "sequence", "sequence_sum", "max_length")
TENSORS = ("ratio", "log_ratio", "sequence_log_ratio", "logprobs", "advantages")
OBJECTIVES: Registry[Objective] = Registry("objective")


def register_objective(
    name: str, *, per: str, clips: Callable[..., Tensor] | None = None, **implied: Any
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator that files the function below it as the objective called `name`."""

    def file_under_name(term: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if per not in PER:
            raise ValueError(f"objective '{name}': per is '{per}', knows {', '.join(PER)}")
        OBJECTIVES.register(name)(Objective(term, per, implied, clips))
        return term

    return file_under_name


def find_objective(name: str) -> Objective:
    """The objective called `name`, or the one that @register_objective made of `module:function`, `path/file.py:function`."""
    entry: Any = OBJECTIVES.get(name)
    if isinstance(entry, Objective):
        return entry
    for other in OBJECTIVES.names():
        if OBJECTIVES.get(other).term is entry:
            return OBJECTIVES.get(other)
    raise ConfigError(f"objective.loss_type '{name}' is not an objective: put @register_objective above it")


def check_parameters(objective: Objective, name: str, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError if a variant asks for something that is neither a tensor on offer nor a setting."""
    for function in (objective.term, objective.clips):
        for parameter in inspect.signature(function).parameters.values() if function else ():
            known = parameter.name in TENSORS or parameter.name in settings
            if not known and parameter.default is parameter.empty:
                raise ConfigError(
                    f"objective.loss_type '{name}' asks for '{parameter.name}': there are the tensors {', '.join(TENSORS)}, "
                    f"and the keys of objective. Rename it, or give it a default"
                )


def clipped_by_ppo(ratio: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float | None) -> Tensor:
    high = epsilon if epsilon_high is None else epsilon_high
    return ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))


@register_objective("grpo", per="sequence", clips=clipped_by_ppo)
@register_objective("dapo", per="token", clips=clipped_by_ppo)
@register_objective("bnpo", per="token", clips=clipped_by_ppo)  # arXiv 2506.02864; TRL counts tokens per micro-batch
@register_objective("dr_grpo", per="max_length", clips=clipped_by_ppo)
@register_objective("gspo", per="sequence", clips=clipped_by_ppo, importance_sampling_level="sequence")
@register_objective("luspo", per="sequence_sum", clips=clipped_by_ppo, importance_sampling_level="sequence")
@register_objective("gfpo", per="token", clips=clipped_by_ppo, subset="shortest")
def clipped(
    ratio: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float | None, delta: float | None
) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)          (PPO, arXiv 1707.06347, eq. 7)

    `delta` caps the unclipped ratio: a bound where A < 0, which the clip leaves open above (dual-clip PPO, arXiv
    1912.09729, eq. 5; INTELLECT-2, arXiv 2505.07291). Where the published variants differ is `per` and the ratio:
    gspo (arXiv 2507.18071), luspo (arXiv 2602.05261), gfpo (arXiv 2508.09726: subset "shortest").
    """
    high = epsilon if epsilon_high is None else epsilon_high
    capped = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(capped * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)


def above_cap(ratio: Tensor, advantages: Tensor, *, epsilon_high: float | None) -> Tensor:
    return (ratio > (CISPO_CAP if epsilon_high is None else epsilon_high)) & (advantages > 0)


CISPO_CAP = 5.0
"""What epsilon_high null means for cispo. TRL falls back to epsilon (0.2), which caps every ratio, 1 included."""


@register_objective("cispo", per="token", clips=above_cap)
def cispo(ratio: Tensor, advantages: Tensor, logprobs: Tensor, *, epsilon_high: float | None) -> Tensor:
    """-min(ratio, epsilon_high).detach() * A * logp: the weight is capped, no token loses its gradient.

    (MiniMax-M1, arXiv 2506.13585, eq. 4; ScaleRL, arXiv 2510.13786.) `epsilon_high` is the cap itself, as in TRL.
    """
    return -ratio.clamp(max=CISPO_CAP if epsilon_high is None else epsilon_high).detach() * advantages * logprobs


@register_objective("sapo", per="sequence")
def sapo(ratio: Tensor, advantages: Tensor, *, sapo_temperature_pos: float, sapo_temperature_neg: float) -> Tensor:
    """-sigmoid(tau * (ratio - 1)) * 4 / tau * A, tau by the sign of A: a soft clip   (SAPO, arXiv 2511.20347)."""
    tau = torch.where(advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


@register_objective("vespo", per="token")
def vespo(
    sequence_log_ratio: Tensor,
    advantages: Tensor,
    logprobs: Tensor,
    *,
    vespo_k_pos: float,
    vespo_lambda_pos: float,
    vespo_k_neg: float,
    vespo_lambda_neg: float,
) -> Tensor:
    """-phi(w).detach() * A * logp, log phi = lambda + k * log w - lambda * w, w the ratio of the whole completion (VESPO,
    arXiv 2602.10693): a weight that is 1 at w = 1 and fades on both sides.
    """
    log_w = sequence_log_ratio.detach().clamp(math.log(1e-8), LIMIT)
    k = torch.where(advantages >= 0, vespo_k_pos, vespo_k_neg)
    lam = torch.where(advantages >= 0, vespo_lambda_pos, vespo_lambda_neg).clamp(min=1e-4)
    return -torch.exp(lam + k * log_w - lam * log_w.exp()) * advantages * logprobs


@register_objective("rloo", per="sequence_sum", advantage_estimator="rloo")
@register_objective("reinforce_plus_plus", per="token", advantage_estimator="reinforce_plus_plus")
def reinforce(advantages: Tensor, logprobs: Tensor) -> Tensor:
    """-A * logp: no ratio, no clip                      (REINFORCE; RLOO, arXiv 2402.14740; REINFORCE++, arXiv 2501.03262).

    Summed over a completion it is -A * log p(completion), whose gradient RLOO averages.
    """
    return -advantages * logprobs


@dataclass
class Loss:
    """What one batch adds to the loss: already divided by counts over all ranks, so batches and ranks add up."""

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
    objective: Objective,
    counts: Counts,
    settings: Mapping[str, Any],
    *,
    entropies_N: Tensor | None = None,
    correction_N: Tensor | None = None,
) -> Loss:
    """The formula at the top of the file. `settings` are the keys of the config's `objective`.

    reference_logprobs_N None = no KL term; entropies_N (with a gradient) is only needed where entropy_coef is not 0;
    correction_N weights the policy term for tokens that another policy drew (`importance_correction`).
    """
    log_ratio = (logprobs_N - old_logprobs_N).clamp(-LIMIT, LIMIT)
    sequence_log_ratio = per_sequence(log_ratio, batch)
    level = settings.get("importance_sampling_level") or objective.implied.get("importance_sampling_level", "token")
    lengths_N = batch.lengths_S[batch.sequence_N]
    ratio = torch.exp(log_ratio if level == "token" else sequence_log_ratio / lengths_N)
    offered = {
        **settings,
        "ratio": ratio,
        "log_ratio": log_ratio,
        "sequence_log_ratio": sequence_log_ratio,
        "logprobs": logprobs_N,
        "advantages": batch.advantages_N,
    }
    per_token = by_name(objective.term, offered)
    if correction_N is not None:
        per_token = per_token * correction_N
    counted = (batch.weights_N != 0).to(per_token.dtype)
    kl_sum = torch.zeros((), device=per_token.device)
    if reference_logprobs_N is not None:
        kl = kl_estimate(logprobs_N, reference_logprobs_N, settings.get("kl_estimator", "k3"))
        kl_sum = (kl.detach() * counted).sum()
        per_token = per_token + settings["beta"] * (kl * ratio if settings.get("use_bias_correction_kl") else kl)
    weights = batch.weights_N / lengths_N if objective.per == "sequence" else batch.weights_N
    loss = (per_token * weights).sum() / counts.denominator(objective.per)
    if entropies_N is not None and settings.get("entropy_coef"):
        loss = loss - settings["entropy_coef"] * (entropies_N * batch.weights_N).sum() / max(1.0, counts.tokens)
    clipped = (by_name(objective.clips, offered) * counted).sum() if objective.clips else torch.zeros_like(kl_sum)
    return Loss(loss, kl_sum, clipped)


def per_sequence(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """[N] -> [N]: the sum over the completion that each token belongs to."""
    sums_S = torch.zeros(len(batch.lengths_S), dtype=values_N.dtype, device=values_N.device)
    return sums_S.index_add(0, batch.sequence_N, values_N)[batch.sequence_N]


def importance_correction(
    old_logprobs_N: Tensor, sampling_logprobs_N: Tensor, mode: str, cap: float = 2.0
) -> Tensor | None:
    """Weights for tokens that were drawn by another policy than the one that trains: w = exp(old - sampling) per token.

    none: no weight. truncate: min(w, cap) (TIS, fengyao.notion.site/off-policy-rl). mask: w where it is within
    [1 / cap, cap], else 0 (IcePop). No gradient. Exactly 1 where both policies are the same.
    """
    if mode == "none":
        return None
    weight = torch.exp((old_logprobs_N - sampling_logprobs_N).detach().clamp(-LIMIT, LIMIT))
    if mode == "truncate":
        return weight.clamp(max=cap)
    return torch.where((weight >= 1 / cap) & (weight <= cap), weight, 0.0)


def by_name(function: Callable[..., Tensor], offered: Mapping[str, Any]) -> Tensor:
    """Calls `function` with those of the offered values that it names."""
    names = [name for name in inspect.signature(function).parameters if name in offered]
    return function(**{name: offered[name] for name in names})
