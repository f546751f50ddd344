"""Rewards of length and repetition, by hand."""

import pytest

from grpo.rewards.shaping import cosine_scaled, repetition_penalty

RIGHT, WRONG = "<answer>4</answer>", "<answer>5</answer>"


def test_the_cosine_of_the_length() -> None:
    """Short, a third, half and beyond max_len: (1 + cos) / 2 is 1, 3/4, 1/2 and 0."""
    ids = [[], [1] * 20, [1] * 30, [1] * 99]
    right = cosine_scaled([RIGHT] * 4, ["4"] * 4, ids, max_len=60)
    assert right == pytest.approx([1.0, 0.875, 0.75, 0.5])
    wrong = cosine_scaled([WRONG] * 4, ["4"] * 4, ids, max_len=60)
    assert wrong == pytest.approx([-1.0, -0.875, -0.75, -0.5])
    own = {"min_value_wrong": -10.0, "max_value_wrong": 0.0, "min_value_correct": 1.0, "max_value_correct": 2.0}
    assert cosine_scaled([RIGHT, WRONG], ["4"] * 2, ids[1:2] * 2, max_len=60, **own) == pytest.approx([1.75, -7.5])
    assert cosine_scaled([RIGHT], [None], [[1]], max_len=60) == [None]


def test_repetition_is_counted_in_ngrams() -> None:
    ids = [[1, 2, 3, 4], [5] * 5, [1, 2, 1, 2], [7], []]
    assert repetition_penalty(ids, ngram_size=2) == pytest.approx([0.0, -0.75, -1 / 3, 0.0, 0.0])
    assert repetition_penalty(ids, ngram_size=3) == pytest.approx([0.0, -2 / 3, 0.0, 0.0, 0.0])
    assert repetition_penalty([[5] * 5], ngram_size=2, max_penalty=-2.0) == pytest.approx([-1.5])
