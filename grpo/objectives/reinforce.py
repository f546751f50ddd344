"""REINFORCE, RLOO and REINFORCE++: losses without ratio and clip, and their advantage estimators."""

import torch
from torch import Tensor

from grpo.advantages import STD_EPSILON, center, deviation, finite_rewards, register_advantage
from grpo.losses import register_loss


@register_loss("rloo", per="sequence_sum", advantage_estimator="rloo")
@register_loss("reinforce_plus_plus", per="token", advantage_estimator="reinforce_plus_plus")
def reinforce(advantages: Tensor, logprobs: Tensor) -> Tensor:
    """-A * logp                      (REINFORCE; RLOO, arXiv 2402.14740; REINFORCE++, arXiv 2501.03262).

    Summed over a completion, this is -A * log p(completion). RLOO averages the gradient of that over completions.
    """
    return -advantages * logprobs


@register_advantage("rloo")
def leave_one_out_advantages(rewards_PG: Tensor) -> Tensor:
    """A_i = r_i - mean of the other completions' rewards (RLOO, arXiv 2402.14740, section 3.2).

    # rewards [[1, 0, 0, 1]]: 1 - 1/3 = 2/3 and 0 - 2/3 -> [[2/3, -2/3, -2/3, 2/3]]

    This equals (r_i - mean(r)) * n / (n - 1). A completion's own reward is not in its baseline, so the gradient is
    unbiased.
    """
    rewards = finite_rewards(rewards_PG)
    known = (~rewards.isnan()).sum(1, keepdim=True)
    return center(rewards) * known / (known - 1).clamp(min=1)


@register_advantage("reinforce_plus_plus")
def whole_batch_advantages(rewards_PG: Tensor) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4), both over the whole batch (REINFORCE++, arXiv 2501.03262).

    Prompts are compared with each other: a group of an easy prompt with equal rewards has a positive advantage.
    """
    flat = finite_rewards(rewards_PG).reshape(1, -1)
    return (center(flat) / (deviation(flat) + STD_EPSILON)).reshape(rewards_PG.shape)


@register_advantage("reinforce_plus_plus_baseline")
def whitened_advantages(rewards_PG: Tensor) -> Tensor:
    """A_i = c_i / (std(c) + 1e-4), with c_i = r_i - mean of its group and std over the whole batch.

    This is REINFORCE++-baseline (arXiv 2501.03262). Unlike with scale="batch", the spread between prompts is not part
    of the std.
    """
    rewards = finite_rewards(rewards_PG)
    centered = center(rewards)
    known = torch.where(rewards.isnan(), torch.nan, centered)
    return centered / (deviation(known.reshape(1, -1)) + STD_EPSILON)
