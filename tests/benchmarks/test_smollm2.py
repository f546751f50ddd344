"""SmolLM2's configs are valid, and the benchmark reads the curves of a run."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.smollm2 import draw, measured, table
from grpo.config.parser import load_config
from grpo.data.prompts import worked_examples
from grpo.data.rows import load_examples

CONFIGS = sorted((Path(__file__).parents[2] / "launch" / "configs").glob("smollm2_*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_worked_examples_are_right_and_in_the_form_of_the_data(path: Path) -> None:
    config = load_config([f"--config={path}"])
    assert len(CONFIGS) == 3 and worked_examples(config.data)
    for asked, shown in worked_examples(config.data):
        equations = re.findall(r"(\d+(?: ?[-+*] ?\d+)+) ?= ?(\d+)", shown)
        assert equations or config.data.name == "gsm8k"
        for left, right in equations:
            assert eval(left) == int(right), left  # noqa: S307 (our own file)
        answer = re.fullmatch(r"<reasoning>.*</reasoning>\s*<answer>\s*(\S+)\s*</answer>\n?", shown, re.DOTALL)
        assert asked and answer and (not equations or answer[1] == equations[-1][1])
    if config.data.name != "gsm8k":
        first = load_examples(config.data, "train", 0)[0]
        assert len(first.messages) == 2 * len(worked_examples(config.data)) + 2


def test_the_curves_of_a_run(tmp_path: Path) -> None:
    held_out = {"eval/accuracy_flexible": 0.3, "eval/format": 0.0}
    lines = [
        {"step": 0, "eval/accuracy": 0.19, **held_out},
        {"step": 1, "reward/mean": 0.5, "rollout/length_mean": 30.0, "time/step": 7.5},
        {"step": 2, "reward/mean": 0.9, "rollout/length_mean": 28.0, "time/step": 8.0, "eval/accuracy": 0.96,
         **held_out},
    ]  # fmt: skip
    answers = [{"step": step, "question": "q", "completion": f"c{step}", "answer": "1", "draw": 0} for step in (0, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    (tmp_path / "environment.json").write_text("{}")
    run = measured(tmp_path)
    assert (run["accuracy"], run["training_seconds"]) == ({"0": 0.19, "2": 0.96}, 15.5)
    assert run["after"] == [{"question": "q", "completion": "c2", "answer": "1"}]
    assert table({"0": run}).splitlines()[-1] == "| 0 | 19% → 96% | 30% → 30% | 0% → 0% | 30 → 28 | 2 | 16 |"
    draw({"0": run}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
