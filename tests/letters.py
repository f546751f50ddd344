"""A reward for the tests, found by its import path."""


def count_letters(completions: list, **columns: list) -> list[float]:
    """The share of "a" and "b"."""
    return [sum(letter in "ab" for letter in completion[0]["content"]) / 8 for completion in completions]
