"""The gate: numbers by hand; the model in use stays unless both conditions hold."""

import json
from pathlib import Path

import pytest
import torch

from grpo.errors import ConfigError
from grpo.tools.community.gate import compare, current, decide, promote, set_current
from grpo.tools.community.supervised import kl_per_token


def answers(right: int, of: int) -> list[bool]:
    return [index < right for index in range(of)]


def test_a_comparison_by_hand() -> None:
    found = compare([True, True, False, False], [True, False, True, True])
    assert (found.old, found.new, found.gained, found.lost) == (0.5, 0.75, 2, 1)
    assert found.mcnemar_p == 1.0  # 2 of 3 differing questions: 2 * (C(3,0) + C(3,1)) / 2^3 = 1
    assert compare(answers(0, 10), answers(10, 10)).mcnemar_p == 2 / 2**10
    same = compare(answers(7, 10), answers(7, 10))
    assert same.largest_loss == 0.0 and same.mcnemar_p == 1.0
    with pytest.raises(ConfigError, match="at least one"):
        compare([], [])


def test_the_bound_is_that_of_a_normal_approximation() -> None:
    # 400 questions, 8 lost, 4 gained: loss 0.01, standard error sqrt(12/400 - 0.01^2) / 20 = 0.00865
    old = [True] * 8 + [False] * 4 + [True] * 388
    new = [False] * 8 + [True] * 4 + [True] * 388
    assert compare(old, new).largest_loss == pytest.approx(0.01 + 1.645 * 0.00865, abs=0.002)


@pytest.mark.parametrize(
    ("feedback", "lost", "promoted", "reason"),
    [
        (20, 0, True, ""),
        (3, 0, False, "held-out feedback did not improve: 0.0% -> 6.0% of 50"),
        (20, 6, False, "regression set may have fallen by more than a point: 100.0% -> 97.0% of 200"),
        (0, 6, False, "did not improve"),
    ],
)
def test_both_must_hold(tmp_path: Path, feedback: int, lost: int, promoted: bool, reason: str) -> None:
    decision = decide(
        compare(answers(0, 50), answers(feedback, 50)), compare(answers(200, 200), answers(200 - lost, 200))
    )
    assert decision.promote == promoted
    assert reason in "; ".join(decision.reasons)
    set_current(tmp_path, "old")
    report = promote(tmp_path, decision, "old", "new", "v2").read_text()
    record = current(tmp_path)
    assert record is not None and record["model"] == ("new" if promoted else "old")
    assert ("promoted: new" if promoted else "kept: old") in report and reason in report
    assert json.loads((tmp_path / "gate-1.json").read_text())["promote"] == promoted
    assert promote(tmp_path, decision, "old", "new", "v2").name == "gate-2.md"


def test_too_few_questions_can_never_pass(tmp_path: Path) -> None:
    """2 / 2^5 > 0.05 > 2 / 2^6: with six questions that are all gained, and with no five."""
    same = compare(answers(9, 9), answers(9, 9))
    assert decide(compare(answers(0, 6), answers(6, 6)), same).promote
    for count in (1, 3, 5):
        decision = decide(compare(answers(0, count), answers(count, count)), same)
        assert not decision.promote and decision.reasons[0].startswith(f"{count} held-back questions are too few")
    report = promote(tmp_path, decision, "old", "new", "v2").read_text()
    assert "| none: at least 100.0 points gained |" in report and "| none |" in report and "-100" not in report


def test_nothing_is_in_use_at_first(tmp_path: Path) -> None:
    assert current(tmp_path) is None


def test_kl_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 log 2 + 1/2 log 2/3
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert kl_per_token(p, q).item() == pytest.approx(0.5 * torch.log(torch.tensor(4 / 3)).item())
    assert kl_per_token(p, p).item() == 0.0
