"""Arithmetic without eval: exact values by hand, and attacks that are rejected before parsing."""

import time
from fractions import Fraction

import pytest

from grpo.rewards.countdown import evaluate_arithmetic
from grpo.rewards.registry import REWARDS


@pytest.mark.parametrize(
    ("text", "value", "used"),
    [
        ("7", 7, [7]),
        ("(25 - 5) * 3", 60, [25, 5, 3]),
        ("1 / 3 + 1 / 6", Fraction(1, 2), [1, 3, 1, 6]),
        ("-(-4)", 4, [4]),
        ("2 + 3 * 4", 14, [2, 3, 4]),
        ("12 \u00f7 4 \u00d7 2 \u2212 1", 5, [12, 4, 2, 1]),
        ("0 * 5", 0, [0, 5]),
        ("7 / 2", Fraction(7, 2), [7, 2]),
    ],
)
def test_values(text: str, value: object, used: list[int]) -> None:
    assert evaluate_arithmetic(text) == (value, used)


ATTACKS = [
    "9**9**9**9", "2**2", "7//2", "7%2", "1/0", "1/(2-2)", "", " ", "()", "1+", "+", "1 2", "1.5", "1e9", "0x10", "1_0",
    "08", "1j", "True", "x", "__import__('os').system('id')", "(lambda: 1)()", "[1][0]", "1 if 1 else 2", "1,2", "1;2",
    "a:=1", "1==1", "1 and 2", "not 1", "~1", "1<<9", "1|2",
    "-" * 200_000, "-" * 199 + "1", "1+(" * 30 + "1" + ")" * 30,
    "(" * 200_000, "9" * 13, "+".join(["1"] * 200), "\x001", "١+٢", "²", "f(1)", "1\n+1", "'a'*9",
]  # fmt: skip


@pytest.mark.parametrize("text", ATTACKS, ids=range(len(ATTACKS)))
def test_attacks_are_refused(text: str) -> None:
    began = time.process_time()
    assert evaluate_arithmetic(text) is None
    assert time.process_time() - began < 1  # of this process alone, so a busy machine does not matter


def test_countdown() -> None:
    texts = [
        "<answer>(25 - 5) * 3</answer>",
        "<answer>20 * 3</answer>",  # right, with other numbers
        "<answer>25 - 5 + 3</answer>",  # the numbers, but 23
        "<answer>(25 - 5) * 3 + 5 - 5</answer>",  # a number used too often
        "(25 - 5) * 3",  # no answer block
        "<answer>60</answer>",
    ]
    count = len(texts)
    scores = REWARDS.get("countdown")(completions=texts, nums=[[25, 5, 3]] * count, target=[60] * count)
    assert scores == [1, 0, 0, 0, 0, 0]
    assert REWARDS.get("countdown")(completions=texts[:1], nums=["[25, 5, 3]"], target=["60"]) == [1]
