"""The result of an evaluation in words and as a table."""

import re
from typing import Any

import pytest

from grpo.tools.evaluate_display import sentences, show

BASE = {"eval/accuracy": 0.25, "eval/accuracy_flexible": 0.5, "eval/format": 0.0, "eval/accuracy_ci95": 0.3}
MODEL = {"eval/accuracy": 0.75, "eval/accuracy_flexible": 0.75, "eval/format": 1.0, "eval/accuracy_low": 0.301}
INTERVALS = {"accuracy": (0.301, 0.954), "flexible": (0.301, 0.954)}


def report(**more: Any) -> dict[str, Any]:
    found = {"model": "runs/a/final", "items": 5, "judged": 4, "dropped": 0, "interval95": INTERVALS}
    return found | {"metrics": MODEL | {"eval/accuracy_high": 0.954}} | more


def compared(gained: int, lost: int, p: float) -> dict[str, Any]:
    change = {"only_trained_right": gained, "only_base_right": lost, "mcnemar_p": p}
    return report(base={"model": "b", "metrics": BASE, "interval95": INTERVALS}, change={"accuracy": change})


def test_the_sentences() -> None:
    assert sentences(report()) == [
        "runs/a/final answers 3 of 4 held-out questions right: 75.0% (95 % interval 30.1% to 95.4%), greedy decoding."
    ]
    assert sentences(compared(2, 0, 0.5))[1] == (
        "Base b: 25.0%. Of the same questions, 2 gained and 0 lost: McNemar's exact test p = 0.5, no change."
    )
    assert sentences(compared(20, 1, 2.1e-5))[1].endswith("p = 2.1e-05, a gain.")
    assert sentences(compared(1, 20, 2.1e-5))[1].endswith("p = 2.1e-05, a loss.")
    assert sentences(report(dropped=3))[1] == "3 questions were left out: longer than data.max_prompt_length."
    unjudged = report(metrics={"eval/format": 1.0}, interval95={}, judged=0)
    assert sentences(unjudged)[0].startswith("runs/a/final answered 5 held-out questions. No row has a gold answer")


def test_the_table_has_both_models_and_the_change(capsys: pytest.CaptureFixture[str]) -> None:
    show(compared(2, 0, 0.5))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    rows = [re.split(r" {2,}", line) for line in lines]
    assert ["accuracy", "0.250 [-0.050, 0.550]", "0.750 [0.301, 0.954]", "+0.500"] in rows
    assert ["accuracy_flexible", "0.500 [0.301, 0.954]", "0.750 [0.301, 0.954]", "+0.250"] in rows
    assert ["format", "0.000", "1.000", "+1.000"] in rows and "ci95" not in "".join(lines)
