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
