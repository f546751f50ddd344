"""Rewards of the tests, in a file that a worker process imports without torch."""

from typing import Any


def count_a(completions: list[str], **columns: Any) -> list[float]:
    return [float(completion.count("a") + completion.count("b")) for completion in completions]


def by_length(completions: Any, **columns: Any) -> list[float]:
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [float(text.count("a")) + 0.1 * len(set(text)) for text in texts]


def constant(completions: Any, **columns: Any) -> list[float]:
    return [1.0] * len(completions)
