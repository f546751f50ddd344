"""Advantages: rewards [P, G] -> advantages [P, G]. How much better was each completion than its siblings?

A new estimator names what it needs: rewards_PG (of all ranks), by_reward (name -> [P, G]), weights (name -> float), scale.
Below it, which completions of a group are learned from at all (`objective.subset`).
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from grpo.registry import Registry

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""
LARGEST = 1e30
"""Rewards beyond it count as it: sums of squares stay finite in float64, and advantages in float32."""

ADVANTAGES: Registry[Callable[..., Tensor]] = Registry("advantage estimator")
register_advantage = ADVANTAGES.register
SUBSETS: Registry[Callable[..., Tensor]] = Registry("subset")
register_subset = SUBSETS.register


@register_advantage("group")
def group_advantages(rewards_PG: Tensor, *, scale: Literal["group", "batch", "none"] = "group") -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) within each group (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    scale="group" divides by the group's own standard deviation, "batch" by that of all rewards given, "none" not at all
    (Dr. GRPO, arXiv 2503.20783). The standard deviation is Bessel-corrected, as in TRL.

    # rewards [[1, 0, 0, 1]]: mean 0.5, std 0.57735 -> advantages [[0.8659, -0.8659, -0.8659, 0.8659]]

    [P, G] -> [P, G] float64. A reward of NaN (or infinity) means "no reward applied": it is left out of mean and
    std, and its own advantage is 0. A group whose rewards are all equal teaches nothing: its row is exactly 0, not rounding noise.
    """
    rewards = _cleaned(rewards_PG)
    centered = _centered(rewards)
    if scale == "none":
        return centered
    return centered / (_std(rewards if scale == "group" else rewards.reshape(1, -1)) + EPSILON)


@register_advantage("rloo")
def leave_one_out_advantages(rewards_PG: Tensor) -> Tensor:
    """A_i = r_i - mean of the other completions' rewards (RLOO, arXiv 2402.14740, section 3.2).

    # rewards [[1, 0, 0, 1]]: 1 - 1/3 = 2/3 and 0 - 2/3 -> [[2/3, -2/3, -2/3, 2/3]]

    The same as (r_i - mean(r)) * n / (n - 1): its own reward is not in its baseline, so the gradient is unbiased.
    """
    rewards = _cleaned(rewards_PG)
    known = (~rewards.isnan()).sum(1, keepdim=True)
    return _centered(rewards) * known / (known - 1).clamp(min=1)


@register_advantage("reinforce_plus_plus")
def whole_batch_advantages(rewards_PG: Tensor) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4), both over the whole batch (REINFORCE++, arXiv 2501.03262).

    Prompts compete with each other: a flat group of an easy prompt has a positive advantage.
    """
    flat = _cleaned(rewards_PG).reshape(1, -1)
    return (_centered(flat) / (_std(flat) + EPSILON)).reshape(rewards_PG.shape)


@register_advantage("reinforce_plus_plus_baseline")
def whitened_advantages(rewards_PG: Tensor) -> Tensor:
    """A_i = c_i / (std(c) + 1e-4) with c_i = r_i - mean of its group, std over the whole batch (REINFORCE++-baseline,
    arXiv 2501.03262). Unlike scale="batch", the spread between prompts is not part of the std.
    """
    rewards = _cleaned(rewards_PG)
    centered = _centered(rewards)
    known = torch.where(rewards.isnan(), torch.nan, centered)
    return centered / (_std(known.reshape(1, -1)) + EPSILON)


@register_advantage("gdpo")
def per_reward_advantages(by_reward: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Each reward normalised in its group, their weighted sum normalised over the batch (GDPO, arXiv 2601.05242).

    A sum of rewards hides which one differed: rewards (1, 0) and (0, 1) of two kinds add up to the same. Here each kind is
    compared by itself first. TRL: multi_objective_aggregation normalize_then_sum.
    """
    weighed = {name: values for name, values in by_reward.items() if weights[name] != 0}
    summed = torch.stack([weights[name] * group_advantages(values) for name, values in weighed.items()]).sum(0)
    nothing_applied = torch.stack([values.isnan() for values in weighed.values()]).all(0)
    known = torch.where(nothing_applied, torch.nan, summed).reshape(1, -1)
    flat = (summed == 0).all(1, keepdim=True)  # nothing to learn: not even the batch's mean
    mean = known.nanmean()
    return torch.where(flat | nothing_applied, 0.0, (summed - mean) / (_std(known) + EPSILON))


@register_subset("shortest")
def shortest(rewards_PG: Tensor, lengths_PG: Tensor, size: int) -> Tensor:
    """[P, size] indices: the shortest completions of each group (GFPO, arXiv 2508.09726, section 3: less chatter)."""
    return lengths_PG.argsort(dim=1, stable=True)[:, :size].sort(dim=1).values


@register_subset("token_efficiency")
def most_reward_per_token(rewards_PG: Tensor, lengths_PG: Tensor, size: int) -> Tensor:
    """[P, size] indices: the highest reward per token (GFPO, arXiv 2508.09726, section 3.2: Token Efficiency GFPO)."""
    efficiency = rewards_PG.nan_to_num(nan=-torch.inf) / lengths_PG.clamp(min=1)
    return (-efficiency).argsort(dim=1, stable=True)[:, :size].sort(dim=1).values


@register_subset("max_variance")
def max_variance(rewards_PG: Tensor, lengths_PG: Tensor, size: int) -> Tensor:
    """[P, size] indices: the subset of each group whose rewards vary most (PODS, arXiv 2504.13818, theorem 1: it is always
    some of the highest and some of the lowest).

    # rewards [[0, 1, 1, 1]], size 2: one of the highest and the lowest -> [[0, 3]]
    """
    rewards = rewards_PG.to(torch.float64).nan_to_num(nan=0.0)
    order = rewards.argsort(dim=1, stable=True)
    count = rewards.shape[1]
    # [size + 1, size]: `high` from the top, the rest from the bottom
    choices = torch.stack(
        [
            torch.cat([torch.arange(size - high), torch.arange(count - high, count)])
            for high in [size // 2, *[high for high in range(size + 1) if high != size // 2]]  # ties: half and half
        ]
    )
    picked = order[:, choices]  # [P, size + 1, size]
    variance = rewards[:, None].expand(-1, len(choices), -1).gather(2, picked).var(dim=2, correction=0)
    best = (variance >= variance.amax(1, keepdim=True) - 1e-12).int().argmax(1)
    return picked[torch.arange(len(rewards)), best].sort(dim=1).values


def overlong_penalty(lengths: Tensor, max_completion_length: int, cache: int) -> Tensor:
    """0 up to max - cache tokens, then falling in a line to -1 at max (DAPO, arXiv 2503.14476, eq. 13).

    # max 10, cache 4: length 6 -> 0, 7 -> -0.25, 10 -> -1
    """
    return ((max_completion_length - cache - lengths) / cache).clamp(-1.0, 0.0)


def _cleaned(rewards_PG: Tensor) -> Tensor:
    """float64, infinity as NaN (no reward applied), and no reward beyond LARGEST."""
    rewards = rewards_PG.to(torch.float64)
    return torch.where(rewards.isinf(), torch.nan, rewards.clamp(-LARGEST, LARGEST))


def _centered(rewards: Tensor) -> Tensor:
    """Minus the mean of its row; exactly 0 for NaN, and for a row whose rewards are all equal."""
    known = ~rewards.isnan()
    low = torch.where(known, rewards, torch.inf).amin(1, keepdim=True)
    high = torch.where(known, rewards, -torch.inf).amax(1, keepdim=True)
    return torch.where(known & (high > low), rewards - rewards.nanmean(1, keepdim=True), 0.0)


def _std(rewards: Tensor) -> Tensor:
    """[P, 1]: Bessel-corrected standard deviation of each row's known rewards."""
    known = ~rewards.isnan()
    squares = torch.where(known, (rewards - rewards.nanmean(1, keepdim=True)) ** 2, 0.0).sum(1, keepdim=True)
    return (squares / (known.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()
