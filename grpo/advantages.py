"""Advantages: rewards [P, G] -> advantages [P, G]. How much better was each completion than its siblings?"""

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""


def group_advantages(rewards_PG: Tensor, *, scale: Literal["group", "batch", "none"] = "group") -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) within each group (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    scale="group" divides by the group's own standard deviation, "batch" by that of all rewards given, "none" not at all
    (Dr. GRPO, arXiv 2503.20783). The standard deviation is Bessel-corrected, as in TRL.

    # rewards [[1, 0, 0, 1]]: mean 0.5, std 0.57735 -> advantages [[0.8659, -0.8659, -0.8659, 0.8659]]

    [P, G] -> [P, G] float64. A reward of NaN means "no reward applied": it is left out of mean and std, and its own
    advantage is 0. A group whose rewards are all equal teaches nothing: its row is exactly 0, not rounding noise.
    """
    rewards = rewards_PG.to(torch.float64)
    known = ~rewards.isnan()
    filled = torch.where(known, rewards, 0.0)
    mean_P1 = filled.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    centered = torch.where(known, filled - mean_P1, 0.0)
    low = torch.where(known, rewards, torch.inf).amin(1, keepdim=True)
    high = torch.where(known, rewards, -torch.inf).amax(1, keepdim=True)
    centered = torch.where(high > low, centered, 0.0)
    if scale == "none":
        return centered
    if scale == "group":
        spread = _std(filled, known, mean_P1, dim=1)
    else:
        flat, flat_known = filled.flatten()[None], known.flatten()[None]
        mean = flat.sum(1, keepdim=True) / flat_known.sum(1, keepdim=True).clamp(min=1)
        spread = _std(flat, flat_known, mean, dim=1)
    return centered / (spread + EPSILON)


def _std(values: Tensor, known: Tensor, mean: Tensor, dim: int) -> Tensor:
    squares = torch.where(known, (values - mean) ** 2, 0.0).sum(dim, keepdim=True)
    return (squares / (known.sum(dim, keepdim=True) - 1).clamp(min=1)).sqrt()
