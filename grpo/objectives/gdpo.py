"""GDPO: each reward is normalised separately before they are summed (arXiv 2601.05242)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from grpo.advantages import STD_EPSILON, deviation, group_advantages, register_advantage


@register_advantage("gdpo")
def per_reward_advantages(by_reward: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Normalise each reward in its group, then normalise their weighted sum over the batch (GDPO, arXiv 2601.05242).

    A sum of rewards does not show which one differed: rewards (1, 0) and (0, 1) have the same sum. Here each reward is
    compared separately first. TRL: multi_objective_aggregation normalize_then_sum.

    Args:
        by_reward: name -> rewards [P, G]. NaN: the reward did not apply.
        weights: name -> weight in the sum.

    Returns:
        Advantages [P, G]. 0 for a group whose sum is 0 everywhere, and for completions to which no reward applied.
    """
    weighed = {name: values for name, values in by_reward.items() if weights[name] != 0}
    summed = torch.stack([weights[name] * group_advantages(values) for name, values in weighed.items()]).sum(0)
    nothing_applied = torch.stack([values.isnan() for values in weighed.values()]).all(0)
    known = torch.where(nothing_applied, torch.nan, summed).reshape(1, -1)
    flat = (summed == 0).all(1, keepdim=True)  # no signal: the batch's mean must not be subtracted either
    mean = known.nanmean()
    return torch.where(flat | nothing_applied, 0.0, (summed - mean) / (deviation(known) + STD_EPSILON))
