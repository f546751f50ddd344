"""One of two ranks runs out of memory: both start the update again with smaller batches, as if started with them."""

from pathlib import Path
from typing import Any

import pytest

from tests.fakes import tiny_data, tiny_folder
from tests.runtime.test_distributed import CPU_2, FSDP_2, LORA, OFFLOADED, launch, same_run

SMALLER = "out of memory in the update: tokens_per_batch is 32 instead of 64"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    tiny_folder(place / "model")
    tiny_data(place / "data.jsonl", rows=11)
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "fault", "changes"),
    [
        (CPU_2, "1:forward:32", {}),
        (CPU_2, "0:backward:32:1", {"tokens_per_batch": 256}),
        (FSDP_2, "1:forward:32", {}),
        (FSDP_2, "0:backward:32:1", {"objective.num_iterations": 2}),
        (FSDP_2, "1:reference:32", LORA | {"objective.beta": 0.1}),
        (OFFLOADED, "1:backward:32", {"model.gradient_checkpointing": True}),
    ],
    ids=["ddp", "ddp in its only batch", "fsdp", "fsdp backward", "fsdp reference", "fsdp offloaded"],
)
def test_both_ranks_go_on_with_smaller_batches(
    place: Path,
    launcher: list[str],
    fault: str,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setenv("GRPO_KERNELS", "torch")  # so that layers are called, and their hooks
    monkeypatch.setenv("OOM", fault)
    name = request.node.callspec.id
    found = launch(place, name, launcher, "tests/out_of_memory_train.py", **{"steps": 2, "eval_every": 0} | changes)
    assert found.code == 0, found.stderr[-3000:]
    before = changes.get("tokens_per_batch", 64)
    assert f"out of memory in the update: tokens_per_batch is {before // 2} instead of {before}" in found.output
    settings = {"steps": 2, "eval_every": 0} | changes | {"tokens_per_batch": 32}
    expected = launch(place, f"{name} at once", launcher, **settings)
    same_run(expected, found)
