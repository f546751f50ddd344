"""Weights and masks of the policy term, without a gradient: for completions of another policy, and for some tokens.

rollout.correction                   weights w = p(old) / p(sampling)
objective.off_policy_mask_threshold  leaves out completions with a negative advantage, far from the policy
objective.top_entropy_quantile       leaves out tokens of low entropy
"""

import math
from typing import Any

import torch
from torch import Tensor

from grpo.losses import MAX_LOG_RATIO, per_sequence
from grpo.packing import PackedBatch

MIN_LOG_CORRECTION = math.log(1e-8)
"""Log of a correction that is 0, for its sum over a completion."""


def importance_correction(
    old_logprobs_N: Tensor,
    sampling_logprobs_N: Tensor,
    mode: str,
    cap: float = 2.0,
    floor: float | None = None,
    batch: PackedBatch | None = None,
) -> Tensor | None:
    """Return weights [N] for tokens that another policy drew: w = exp(old - sampling) of each token.

    none: no weight. truncate: min(w, cap) (TIS, fengyao.notion.site/off-policy-rl). mask: w where it is within [floor,
    cap], else 0 (IcePop, arXiv 2510.18855). sequence_truncate, sequence_mask: the same with the w of the whole
    completion, the product over its tokens; geometric_mask: with their geometric mean. Exactly 1 where both policies
    are the same.

    Args:
        floor: Lower bound. None: 0 for truncate, 1 / cap for mask.
        batch: The completions, for weights of whole ones.
    """
    if mode == "none":
        return None
    level, _, bound = mode.rpartition("_")
    log_weight = (old_logprobs_N - sampling_logprobs_N).detach()
    if level:
        assert batch is not None
        log_weight = per_sequence(log_weight, batch)
        if level == "geometric":
            log_weight = log_weight / batch.lengths_S[batch.sequence_N]
    weight = torch.exp(log_weight.clamp(max=MAX_LOG_RATIO))
    if bound == "truncate":
        return weight.clamp(floor, cap)
    return torch.where((weight >= (1 / cap if floor is None else floor)) & (weight <= cap), weight, 0.0)


def sequence_log_correction(correction_N: Tensor | None, batch: PackedBatch, mode: str) -> Tensor | None:
    """Return the log [N] of the correction of the completion that each token belongs to. None without a correction."""
    if correction_N is None:
        return None
    logs = correction_N.log().clamp(MIN_LOG_CORRECTION, MAX_LOG_RATIO)
    return logs if "_" in mode else per_sequence(logs, batch)


def off_policy_mask(logprobs_N: Tensor, batch: PackedBatch, threshold: float) -> Tensor:
    """Return a mask [N] that is 0 for the tokens of completions that are far from the policy and not to be repeated.

    0 where A < 0 and the mean of sampling - logprobs over the completion is above `threshold` (off-policy sequence
    masking, DeepSeek-V3.2, arXiv 2512.02556).
    """
    drift = per_sequence(batch.sampling_logprobs_N - logprobs_N.detach(), batch) / batch.lengths_S[batch.sequence_N]
    return ((batch.advantages_N >= 0) | (drift <= threshold)).float()


def policy_term_mask(
    objective: Any, logprobs_N: Tensor, batch: PackedBatch, high_entropy_N: Tensor | None
) -> Tensor | None:
    """Return the mask [N] of the policy term that the settings ask for, or None."""
    mask = None if high_entropy_N is None else high_entropy_N.float()
    if objective.off_policy_mask_threshold is not None:
        near = off_policy_mask(logprobs_N, batch, objective.off_policy_mask_threshold)
        mask = near if mask is None else mask * near
    return mask


def quantile(values: Tensor, q: float) -> float:
    """Return the q-quantile of values [K], linear between two of them, for any K above 0 (torch's has a limit)."""
    ordered, place = values.double().sort().values, q * (len(values) - 1)
    low = ordered[math.floor(place)]
    return float(low + (ordered[math.ceil(place)] - low) * (place - math.floor(place)))
