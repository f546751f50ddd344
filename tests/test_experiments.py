"""The grid: what is measured of a run, intervals, and a grid that names only what exists."""

from pathlib import Path

import pytest
import yaml

from grpo.config import load_config
from launch.experiments import mean_and_interval, measured, table

GRIDS = sorted((Path(__file__).parent.parent / "launch" / "configs" / "experiments").glob("*.yaml"))


def test_measured_by_hand() -> None:
    lines = [{"step": 0, "eval/accuracy": 0.2}]
    lines += [
        {"step": s, "reward/accuracy/mean": a, "policy/kl": 0.1 * s, "rollout/length_mean": 9.0}
        for s, a in ((1, 0.2), (2, 0.9), (3, 0.7))
    ]
    lines[-1]["eval/accuracy"] = 0.8
    rollouts = [{"step": step} for step in (1, 1, 2, 2, 2, 3)]
    got = measured(lines, rollouts)
    assert got["area"] == pytest.approx((0.2 + 0.9 + 0.7) / 3)
    assert (got["completions_to_90"], got["completions"]) == (5, 6)  # those of steps 1 and 2
    assert (got["before"], got["after"], got["kl"]) == (0.2, 0.8, pytest.approx(0.3))
    assert measured(lines[:2] + lines[-1:], rollouts)["completions_to_90"] is None


def test_the_interval_is_students() -> None:
    got = mean_and_interval([0.2, 0.4, 0.3])
    assert got == {"mean": pytest.approx(0.3), "half_width": pytest.approx(4.303 * 0.1 / 3**0.5)}
    assert mean_and_interval([0.5]) == {"mean": 0.5, "half_width": None}


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_variation_is_a_valid_config(path: Path) -> None:
    grid = yaml.safe_load(path.read_text())
    assert len(grid["seeds"]) >= 3
    for changes in grid["variations"].values():
        load_config([f"--{key}={value}" for key, value in (grid["base"] | changes).items()])


def test_the_table_shows_differences_seed_by_seed() -> None:
    value = {"mean": 0.5, "half_width": 0.1}
    keys = ("area", "before", "after", "kl", "length", "cpu_seconds")
    row = {"seeds": 2, "runs": {0: {"completions_to_90": 64}, 1: {"completions_to_90": None}}} | dict.fromkeys(
        keys, value
    )
    other = row | {"area_against_first": {"mean": -0.02, "half_width": 0.01}}
    shown = table({"command": "c", "variations": {"base": row, "other": other}}).splitlines()
    assert shown[-1].startswith("| other | 2 | 0.500 ± 0.100 | -0.020 ± 0.010 | 64 / – | 0.500 → 0.500 |")
