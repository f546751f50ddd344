"""A reward for tests, loaded by its import path."""


def count_letters(completions: list, **columns: list) -> list[float]:
    """Return the share of "a" and "b"."""
    return [sum(letter in "ab" for letter in completion[0]["content"]) / 8 for completion in completions]
