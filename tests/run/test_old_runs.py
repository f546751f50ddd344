"""Checkpoints of the first version of the trainer resume with the same steps as the uninterrupted run."""

import json
import shutil
from pathlib import Path

import pytest

from grpo.config.parser import load_config
from grpo.trainer import train

OLD_RUNS = Path(__file__).parents[1] / "fixtures" / "old_runs"
CASES = sorted(path.parent.name for path in OLD_RUNS.glob("*/expected.json"))


RESUME = ["--resume=auto", "--allow_changes=[rewards]"]
"""The file of their reward has been formatted since."""


def today(key: str) -> str:
    """The key of a metric: older runs name a reward by its whole address."""
    return key.replace("tests.letters:count_letters", "count_letters")


def test_the_cases_are_there() -> None:
    assert CASES == ["curriculum", "lora", "sampling_ahead", "streaming"]


@pytest.mark.parametrize("case", CASES)
def test_an_old_checkpoint_is_resumed(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model", "data.jsonl", case):
        copy = shutil.copytree if (OLD_RUNS / name).is_dir() else shutil.copy
        copy(OLD_RUNS / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    expected = json.loads((tmp_path / case / "expected.json").read_text())
    train(load_config([f"--{key}={value}" for key, value in expected["flags"].items()] + RESUME))
    metrics, rollouts = (
        [json.loads(line) for line in Path(case, f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "rollouts")
    )
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    # "?" is the unknown token of this tokenizer, a special one: texts of older runs had none of those.
    shown, before = (
        [text.replace("?", "") for text in texts]
        for texts in ([row["completion"] for row in rollouts if row["step"] > 2], expected["completions"])
    )
    assert shown == before
    for row, before in zip(metrics[2:], expected["metrics"], strict=True):
        for key, value in before.items():
            assert row[today(key)] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    state = json.loads(Path(case, "checkpoints", "step-4", "state.json").read_text())
    assert state["format"] == 2 and state["progress"]["draws"] == 12
