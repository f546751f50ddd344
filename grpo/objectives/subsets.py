"""Subsets: the completions of each group that the policy learns from (objective.subset)."""

import torch
from torch import Tensor

from grpo.advantages import register_subset


@register_subset("shortest")
def shortest(rewards_PG: Tensor, lengths_PG: Tensor, size: int) -> Tensor:
    """[P, size] indices of the shortest completions of each group (GFPO, arXiv 2508.09726, section 3)."""
    return lengths_PG.argsort(dim=1, stable=True)[:, :size].sort(dim=1).values


@register_subset("token_efficiency")
def most_reward_per_token(rewards_PG: Tensor, lengths_PG: Tensor, size: int) -> Tensor:
    """[P, size] indices of the highest rewards per token (Token Efficiency GFPO, arXiv 2508.09726, section 3.2)."""
    efficiency = rewards_PG.nan_to_num(nan=-torch.inf) / lengths_PG.clamp(min=1)
    return (-efficiency).argsort(dim=1, stable=True)[:, :size].sort(dim=1).values


@register_subset("max_variance")
def max_variance(rewards_PG: Tensor, lengths_PG: Tensor, size: int) -> Tensor:
    """[P, size] indices of the subset of each group whose rewards vary most (PODS, arXiv 2504.13818, theorem 1).

    By the theorem, it consists of some of the highest and some of the lowest rewards.

    # rewards [[0, 1, 1, 1]], size 2: one of the highest and the lowest -> [[0, 3]]
    """
    rewards = rewards_PG.to(torch.float64).nan_to_num(nan=0.0)
    order = rewards.argsort(dim=1, stable=True)
    count = rewards.shape[1]
    # [size + 1, size]: `high` from the top, the rest from the bottom
    choices = torch.stack(
        [
            torch.cat([torch.arange(size - high), torch.arange(count - high, count)])
            for high in [
                size // 2,
                *[high for high in range(size + 1) if high != size // 2],
            ]  # on ties, prefer half from each end
        ]
    )
    picked = order[:, choices]  # [P, size + 1, size]
    variance = rewards[:, None].expand(-1, len(choices), -1).gather(2, picked).var(dim=2, correction=0)
    best = (variance >= variance.amax(1, keepdim=True) - 1e-12).int().argmax(1)
    return picked[torch.arange(len(rewards)), best].sort(dim=1).values
