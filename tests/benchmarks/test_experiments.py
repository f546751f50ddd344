"""The grid: numbers of a run, intervals, and names that exist."""

import re
from pathlib import Path

import pytest
import yaml

from benchmarks.experiments import collect, mean_and_interval, measured, table
from grpo.config.parser import load_config

GRIDS = sorted((Path(__file__).parents[2] / "launch" / "configs" / "experiments").glob("*.yaml"))


def run(*rewards: float) -> dict:
    lines = [{"step": 0, "eval/accuracy": 0.2}]
    lines += [
        {"reward/mean": reward, "policy/kl": 0.1, "rollout/length_mean": 9.0, "time/step": 2.0} for reward in rewards
    ]
    lines[-1]["eval/accuracy"] = 0.8
    return measured(lines)


def test_measured_by_hand() -> None:
    got = run(0.2, 0.9)
    assert got == {"before": 0.2, "after": 0.8, "reward": [0.2, 0.9], "kl": 0.1, "length": 9.0, "seconds": 4.0}


def test_variations_are_compared_seed_by_seed_and_stored_runs_stay(tmp_path: Path) -> None:
    grid = {"base": {}, "seeds": [0, 1], "variations": {"base": {}, "other": {}, "later": {}}}
    stored = {"base": {"runs": {"0": run(0.1, 0.3), "1": run(0.5, 0.7)}}, "other": {"runs": {"1": run(0.6, 0.8)}}}
    report = collect(grid, tmp_path, stored)
    base, other = report["variations"]["base"], report["variations"]["other"]
    # areas 0.2 and 0.6: mean 0.4, half-width 12.706 * 0.2828 / sqrt(2); the other one's 0.7 beside seed 1's 0.6
    assert base["area"] == {"mean": pytest.approx(0.4), "half_width": pytest.approx(12.706 * 0.2)}
    assert other["area_against_first"] == {"mean": pytest.approx(0.1), "half_width": None}
    assert report["not_run"] == ["later"]
    shown = table(report | {"command": "c"}).splitlines()
    assert "| other | 1 | 0.700 | +0.100 | 0.200 → 0.800 | 0.100 | 9.0 | 4 |" in shown
    assert shown[-1] == "In the grid, not run yet: later."


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


def test_what_the_page_says_is_what_the_table_says() -> None:
    docs = Path(__file__).parents[2] / "docs"
    said = re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3}", (docs / "experiments.md").read_text(encoding="utf-8"))
    table_text = (docs / "results" / "starter_grid.md").read_text(encoding="utf-8")
    assert len(said) >= 5
    assert [value for value in said if value not in table_text] == []
