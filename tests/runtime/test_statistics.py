"""Intervals and the paired test, by hand and against simulation."""

import random

import pytest

from grpo.rollout.evaluation import compare, intervals, is_correct_in_any_format, item_means, summarize
from grpo.runtime.statistics import mcnemar, mean_interval, wilson_interval


def test_wilson_by_hand_and_by_its_defining_equation() -> None:
    # 5 of 10, z = 1.96: middle 0.5, half = sqrt(0.025 + 3.8415 / 400) * 1.96 / (1 + 0.38415) = 0.2634
    assert wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 3.8415 / 13.8415), abs=1e-4)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    for right, count in ((3, 17), (150, 200)):  # the ends are where (p - q)^2 = z^2 q (1 - q) / n
        for q in wilson_interval(right, count):
            assert (right / count - q) ** 2 == pytest.approx(1.959964**2 * q * (1 - q) / count, rel=1e-5)


def test_mcnemar_by_hand_and_by_counting() -> None:
    assert mcnemar(1, 9) == 22 / 1024  # 2 * (1 + 10) / 2^10
    assert mcnemar(0, 0) == 1.0 and mcnemar(5, 5) == 1.0
    outcomes = [bin(i).count("1") for i in range(2**12)]  # every way in which 12 coins can fall
    as_far = sum(abs(heads - 6) >= abs(3 - 6) for heads in outcomes) / 2**12
    assert mcnemar(3, 9) == pytest.approx(as_far)


def test_the_mean_interval_holds_the_truth_as_often_as_it_says() -> None:
    chance = random.Random(0)
    hits = 0
    for _ in range(400):
        low, high = mean_interval([chance.gauss(2, 3) for _ in range(50)])
        hits += low <= 2 <= high
    assert 0.92 < hits / 400 < 0.97


def rows(right: list[list[int]]) -> list[dict]:
    return [
        {"draw": draw, "sample": sample, "accuracy": float(value), "flexible": 1.0}
        for draw, samples in enumerate(right)
        for sample, value in enumerate(samples)
    ]


def test_two_models_on_the_same_items() -> None:
    base, trained = rows([[0], [0], [1], [0], [1]]), rows([[1], [1], [1], [0], [0]])
    found = compare(base, trained)
    assert found["change"] == pytest.approx(1 / 5)  # +1 +1 0 0 -1
    assert (found["only_base_right"], found["only_trained_right"]) == (1, 2)
    assert found["mcnemar_p"] == mcnemar(1, 2) == 1.0
    assert found["change_low"] < 0 < found["change_high"]
    assert item_means(rows([[1, 0], [1, 1]])) == {0: 0.5, 1: 1.0}
    assert intervals(base)["accuracy"] == wilson_interval(2, 5)
    low, high = intervals(rows([[1, 0], [1, 1]]))["accuracy"]
    assert (low + high) / 2 == pytest.approx(0.75)
    unjudged = [{"draw": 9, "sample": 0, "accuracy": None, "flexible": None}]
    assert intervals(base + unjudged) == intervals(base) and compare(base + unjudged, trained + unjudged) == found
    assert intervals(unjudged) == {}


def test_items_without_a_gold_answer_count_for_the_format_only() -> None:
    known = {"draw": 0, "accuracy": 1.0, "flexible": 1.0, "format": 0.0, "length": 4, "ended": True}
    unknown = {"draw": 1, "accuracy": None, "flexible": None, "format": 1.0, "length": 2, "ended": True}
    metrics = summarize([known, unknown], 1)
    assert metrics["eval/accuracy"] == 1.0 and metrics["eval/format"] == 0.5 and metrics["eval/length_mean"] == 3
    assert "eval/accuracy" not in summarize([unknown], 1)


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("so it is 5, no: 1,080.", "1080", True),
        ("<answer>\n7\n</answer>", "7", True),
        ("<answer>\n7\n</answer> 9", "7", True),
        ("7 or 9", "7", False),
        ("nothing", "7", False),
        ("<answer>tâga</answer>", "ta\u0302ga", True),
        ("7", None, False),
    ],
)
def test_flexible_scoring(text: str, gold: str | None, right: bool) -> None:
    assert is_correct_in_any_format(text, gold) is right
