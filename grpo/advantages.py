"""Advantages: rewards [P, G] -> advantages [P, G], each completion compared with its siblings.

A new estimator names what it needs: rewards_PG (of all ranks), by_reward (name -> [P, G]), weights (name -> float),
scale.
A subset of a group's completions to learn from (objective.subset) is a function of rewards_PG, lengths_PG and size.
grpo/objectives/ has further estimators, and the subsets.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from grpo.errors import ConfigError
from grpo.registry import Registry, check_arguments

STD_EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""
MAX_REWARD = 1e30
"""Rewards are clamped to +-1e30: sums of squares stay finite in float64, and advantages in float32."""
ARGUMENTS = ("rewards_PG", "by_reward", "weights", "scale")

ADVANTAGES: Registry[Callable[..., Tensor]] = Registry(
    "advantage estimator", "grpo.objectives", key="objective.advantage_estimator"
)
register_advantage = ADVANTAGES.register
SUBSETS: Registry[Callable[..., Tensor]] = Registry("subset", "grpo.objectives", key="objective.subset")
register_subset = SUBSETS.register


def check_advantage(name: str, config: Any) -> None:
    """Raise ConfigError if the estimator `name` does not exist, lacks an argument, or would ignore a setting."""
    function, objective = ADVANTAGES.get(name), config.objective
    named = inspect.signature(function).parameters
    check_arguments(f"advantage estimator '{name}'", function, ARGUMENTS, {})
    if "scale" not in named and objective.scale_rewards != "group":
        raise ConfigError(
            f"objective.scale_rewards is {objective.scale_rewards}, but the advantage estimator {name} has a scale of "
            f"its own: leave scale_rewards out, or set objective.advantage_estimator to group"
        )
    if "by_reward" not in named and objective.multi_objective_aggregation == "normalize_then_sum":
        raise ConfigError(
            f"objective.multi_objective_aggregation is normalize_then_sum, which needs each reward by itself, but the "
            f"advantage estimator {name} takes their sum: set objective.advantage_estimator to gdpo, or leave it out"
        )
    ADVANTAGES.check(name, config)


@register_advantage("group")
def group_advantages(rewards_PG: Tensor, *, scale: Literal["group", "batch", "none"] = "group") -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) within each group (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    scale="group" divides by the group's own standard deviation, "batch" by that of all rewards given, "none" not at all
    (Dr. GRPO, arXiv 2503.20783). The standard deviation is Bessel-corrected, as in TRL.

    # rewards [[1, 0, 0, 1]]: mean 0.5, std 0.57735 -> advantages [[0.8659, -0.8659, -0.8659, 0.8659]]

    [P, G] -> [P, G] float64. A reward of NaN (or infinity) means "no reward applied": it is left out of mean and
    std, and its own advantage is 0. A group whose rewards are all equal teaches nothing: its row is exactly 0.
    """
    rewards = finite_rewards(rewards_PG)
    centered = center(rewards)
    if scale == "none":
        return centered
    return centered / (deviation(rewards if scale == "group" else rewards.reshape(1, -1)) + STD_EPSILON)


def overlong_penalty(lengths: Tensor, max_completion_length: int, cache: int) -> Tensor:
    """0 up to max - cache tokens, then falling in a line to -1 at max (DAPO, arXiv 2503.14476, eq. 13).

    # max 10, cache 4: length 6 -> 0, 7 -> -0.25, 10 -> -1
    """
    return ((max_completion_length - cache - lengths) / cache).clamp(-1.0, 0.0)


def finite_rewards(rewards_PG: Tensor) -> Tensor:
    """float64, infinity as NaN (no reward applied), and no reward beyond MAX_REWARD."""
    rewards = rewards_PG.to(torch.float64)
    return torch.where(rewards.isinf(), torch.nan, rewards.clamp(-MAX_REWARD, MAX_REWARD))


def center(rewards: Tensor) -> Tensor:
    """Minus the mean of its row; exactly 0 for NaN, and for a row whose rewards are all equal."""
    known = ~rewards.isnan()
    low = torch.where(known, rewards, torch.inf).amin(1, keepdim=True)
    high = torch.where(known, rewards, -torch.inf).amax(1, keepdim=True)
    return torch.where(known & (high > low), rewards - rewards.nanmean(1, keepdim=True), 0.0)


def deviation(rewards: Tensor) -> Tensor:
    """[P, 1]: Bessel-corrected standard deviation of each row's known rewards."""
    known = ~rewards.isnan()
    squares = torch.where(known, (rewards - rewards.nanmean(1, keepdim=True)) ** 2, 0.0).sum(1, keepdim=True)
    return (squares / (known.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()
