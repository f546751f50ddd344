"""docs/machines.md equals the stored results; every profile was run full and with LoRA; memory estimates are close."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machines import TRIES, WAYS, page
from benchmarks.memory import measure

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def stored(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def test_the_page_is_made_of_the_stored_results() -> None:
    written = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
    assert written == page(RESULTS), "run: python benchmarks/machines.py --table"


def test_every_profile_was_tried_both_ways() -> None:
    assert set(TRIES) == {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    rows = stored("machines")
    assert {(row["profile"], row["way"]) for row in rows} == {(name, way) for name in TRIES for way in WAYS}
    refused = {row["profile"] for row in rows if row["result"] != "ran here"}
    assert refused == {"single_gpu_fp16"}, "on a CPU, all but float16 runs"
    assert all("fp16" in row["message"] for row in rows if row["result"] == "refused")


def test_what_ran_in_float32_is_what_one_process_learns() -> None:
    compared = [row for row in stored("machines") if "largest_weight_difference_to_one_process" in row]
    assert {"cpu_2proc", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "multi_node_fsdp2"} <= {
        row["profile"] for row in compared
    }
    assert all(row["largest_weight_difference_to_one_process"] < 1e-5 for row in compared)


def test_every_run_held_what_was_estimated() -> None:
    near = {row["case"]: row["estimate_mib"] / row["measured_mib"] for row in stored("memory")}
    assert "full, float32, DDP over 2" in near and "full, float32, FSDP2 over 2" in near
    assert all(0.8 <= ratio <= 1.2 for ratio in near.values()), near


@pytest.mark.slow
def test_a_real_run_holds_what_was_estimated(tmp_path: Path) -> None:
    [row] = measure(tmp_path, ["full, float32"])
    assert 0.8 <= row["estimate_over_measured"] <= 1.2, row
