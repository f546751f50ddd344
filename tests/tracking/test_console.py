"""Console: the line of a step, the completions that are shown, and the table at the end."""

import pytest

from grpo.tracking.console import Display


def test_a_step_line_names_the_held_out_accuracy_and_its_step(capsys: pytest.CaptureFixture[str]) -> None:
    """The speed is the mean of the last ten steps: of 100 to 1200, (300 + ... + 1200) / 10 = 750."""
    display = Display(12)
    for step in range(1, 12):
        display.step(step, {"reward/mean": 0.5, "rollout/tokens_per_second": 100.0 * step} | evaluated(step))
    display.step(12, {"reward/mean": 0.5, "rollout/tokens_per_second": 1200.0})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("step 12/12: reward 0.500, held-out accuracy 0.250 (step 10), 750 tokens/s, ")


def evaluated(step: int) -> dict[str, float]:
    return {"eval/accuracy": step / 40} if step % 5 == 0 else {}


def test_the_best_and_the_worst_completion_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": 3, "prompt": "q", "completion": f"text {reward}", "reward": reward} for reward in (0.5, 1.0, 0.2)]
    Display(3).completions(rows)
    out = capsys.readouterr().out
    assert "step 3, the best of 3, reward 1.000" in out and "step 3, the worst of 3, reward 0.200" in out
    assert "text 0.5" not in out and out.index("text 1.0") < out.index("text 0.2")


def test_completions_that_earn_the_same_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    Display(3).completions([{"step": 3, "prompt": "q", "completion": "same", "reward": 1.0}] * 8)
    out = capsys.readouterr().out
    assert out.count("same\n") <= 1 and "step 3, one of 8 that earn the same, reward 1.000" in out


def test_the_table_shows_intervals_beside_the_values(capsys: pytest.CaptureFixture[str]) -> None:
    before = {"eval/accuracy": 0.0, "eval/accuracy_low": 0.0, "eval/accuracy_high": 0.3244, "eval/accuracy_ci95": 0.16}
    after = {"eval/accuracy": 1.0, "eval/accuracy_low": 0.6756, "eval/accuracy_high": 1.0, "eval/format": 0.5}
    Display(3).table(before, after, "outputs/x")
    out = capsys.readouterr().out
    assert "0.000 [0.000, 0.324]" in out and "1.000 [0.676, 1.000]" in out and "+1.000" in out
    assert "ci95" not in out and "accuracy_low" not in out and "[95 % interval]" in out
