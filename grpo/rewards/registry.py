"""Registry of reward functions, apart from the rewards, so that one reward's file can import it without the others."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from grpo.registry import Registry

RewardFunction = Callable[..., list[float | None]]
"""TRL's signature: f(prompts, completions, completion_ids, **columns) -> one number per completion, or None where the
reward does not apply. Every argument is a keyword and a flat list of P * G entries, apart from `reward_kwargs`."""

REWARDS: Registry[RewardFunction] = Registry("reward", package="grpo.rewards")
register_reward = REWARDS.register


def reward_labels(names: Iterable[str]) -> dict[str, str]:
    """Return short names for metrics and rollouts: the function's name, longer only where two would be equal.

    accuracy -> accuracy    /home/me/mine.py:brevity -> brevity, or mine.py:brevity beside other.py:brevity
    """
    names = list(names)
    short = {name: name.rpartition(":")[2] for name in names}
    longer = {name: f"{Path(name.rpartition(':')[0]).name}:{short[name]}" if ":" in name else name for name in names}
    labels = {}
    for name in names:
        taken = [short[other] for other in names if other != name]
        label = short[name] if short[name] not in taken else longer[name]
        labels[name] = label if label not in {longer[other] for other in names if other != name} else name
    return labels


def text_of(completion: Any) -> str:
    """Return the text of a completion as rewards get it: "4", or [{"role": "assistant", "content": "4"}]."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def after_thinking(text: str) -> str:
    """Return the answer of a model that thinks first: the text after </think>. A thought that never ends gives ""."""
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return "" if text.lstrip().startswith("<think>") else text


def one_by_one(seconds: float, needs: str | None = None) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator for a reward that scores each completion by itself.

    Its workers share the completions out, and a slow completion costs no other one its score.

    Args:
        seconds: Deadline for one completion.
        needs: Name of a module that must be installed.
    """

    def mark(function: RewardFunction) -> RewardFunction:
        function.seconds_each, function.needs = seconds, needs  # type: ignore[attr-defined]
        return function

    return mark
