"""Curriculum in a whole run: prompts that were set aside stay so after a resume."""

import json
import shutil
from pathlib import Path

from tests.test_trainer import run, same


def drawn(folder: Path) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    return [(row["step"], row["prompt"]) for row in rows if row["sample"] == 0]


def test_a_curriculum_is_resumed_exactly(tmp_path: Path) -> None:
    # 12 prompts, 6 a step: an epoch is at most two steps, and the stop is within the second one.
    name = f"{tmp_path}/count_a.py:count_a"
    extra = {
        "curriculum.reward": name,
        "curriculum.hopeless": 0.02,
        "curriculum.solved": 0.07,
        "curriculum.return_after": 2,
        "prompts_per_step": 6,
        "steps": 6,
        "eval_every": 0,
    }
    whole = run(tmp_path, "whole", **extra)
    aside = [row["curriculum/solved"] + row["curriculum/hopeless"] for row in whole]
    assert max(aside) > 0 and min(row["curriculum/active"] for row in whole) < 12
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for later in (4, 5, 6):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step-{later}")
    shutil.rmtree(tmp_path / "part" / "final")
    assert same(run(tmp_path, "part", resume="auto", **extra), whole)
    assert drawn(tmp_path / "part") == drawn(tmp_path / "whole")
