"""GMPO: the geometric mean of a completion's clipped ratios (arXiv 2507.20673)."""

from collections.abc import Callable

import torch
from torch import Tensor

from grpo.losses import register_loss


def beyond_clip(log_ratio: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float | None) -> Tensor:
    """Return a mask of the tokens that are clipped in the direction of their advantage (for the clip metrics)."""
    high = epsilon if epsilon_high is None else epsilon_high
    return ((log_ratio < -epsilon) & (advantages < 0)) | ((log_ratio > high) & (advantages > 0))


@register_loss("gmpo", per="sequence", clips=beyond_clip)
def gmpo(
    log_ratio: Tensor,
    advantages: Tensor,
    sequence_mean: Callable[[Tensor], Tensor],
    *,
    epsilon: float,
    epsilon_high: float | None,
) -> Tensor:
    """-exp(mean over the completion of clipped log ratios) * A      (GMPO, arXiv 2507.20673).

    The clip is PPO's, on log-ratios: min(log ratio, clip) where A > 0, else max. epsilon and epsilon_high are limits of
    log-ratios, 0.4 in the paper. An outlier of one token moves the geometric mean less than the arithmetic one of GRPO.
    """
    limited = log_ratio.clamp(-epsilon, epsilon if epsilon_high is None else epsilon_high)
    one_sided = torch.where(advantages > 0, torch.minimum(log_ratio, limited), torch.maximum(log_ratio, limited))
    return -torch.exp(sequence_mean(one_sided)) * advantages
