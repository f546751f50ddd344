"""The reward registry, apart from the rewards, so that one reward's file can import it without the others."""

from collections.abc import Callable
from typing import Any

from grpo.registry import Registry

RewardFunction = Callable[..., list[float | None]]
"""TRL's signature: f(prompts, completions, completion_ids, **columns) -> one number per completion, or None where the
reward does not apply. Every argument is a keyword and a flat list of P * G entries."""

REWARDS: Registry[RewardFunction] = Registry("reward")
register_reward = REWARDS.register


def text_of(completion: Any) -> str:
    """The text of one completion as rewards get it: "4" -> "4";  [{"role": "assistant", "content": "4"}] -> "4"."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def one_by_one(seconds: float, needs: str | None = None) -> Callable[[RewardFunction], RewardFunction]:
    """Says of a reward that it judges each completion by itself, and how long that may take: its workers share the
    completions out, and one that takes longer costs nothing but itself. `needs`: a library that must be installed."""

    def mark(function: RewardFunction) -> RewardFunction:
        function.seconds_each, function.needs = seconds, needs  # type: ignore[attr-defined]
        return function

    return mark
