"""The model of the best evaluation: kept, found again by a resume, and written as final/."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo.errors import ConfigError
from grpo.run.best import BestModel
from tests.test_trainer import run

METRIC = "eval/accuracy"


def saved(text: str):
    """Return a `save` that writes `text` as the model, and an adapter beside it."""

    def save(folder: Path) -> None:
        for name in (folder, folder.parent / "adapter"):
            name.mkdir(parents=True, exist_ok=True)
            (name / "weights").write_text(text)

    return save


def after(tmp_path: Path, values: list[float], greater: bool | None = None, metric: str = METRIC) -> BestModel:
    best = BestModel(tmp_path, metric, greater)
    for step, value in enumerate(values, start=1):
        best.keep(step, 9, {metric: value}, saved(f"step {step}"), main=True)
    return best


def test_the_first_of_the_best_is_kept(tmp_path: Path) -> None:
    best = after(tmp_path, [0.3, 0.5, 0.5, 0.4])
    assert (best.step, best.value) == (2, 0.5)
    best.copy(tmp_path / "copy" / "final")
    assert [(tmp_path / "copy" / name / "weights").read_text() for name in ("final", "adapter")] == ["step 2"] * 2
    best.keep(5, 9, {}, saved("no evaluation"), main=True)
    assert best.step == 2


@pytest.mark.parametrize(("metric", "greater", "step"), [(METRIC, False, 2), ("eval/loss", None, 2), (METRIC, None, 1)])
def test_lower_may_be_better(tmp_path: Path, metric: str, greater: bool | None, step: int) -> None:
    assert after(tmp_path, [0.3, 0.1, 0.2], greater, metric).step == step


def test_a_resumed_run_knows_the_best_of_its_own_steps(tmp_path: Path) -> None:
    after(tmp_path, [0.3, 0.5])
    assert [BestModel(tmp_path, METRIC, None, start).step for start in (1, 2, 3)] == [0, 2, 2]
    assert BestModel(tmp_path, "eval/format", None, 3).value is None
    (tmp_path / "best" / "best.json").write_text(json.dumps({"step": 1, "metric": METRIC, "value": 0.9}))
    assert BestModel(tmp_path, METRIC, None, 3).value is None  # killed between the model and its record


def test_a_metric_that_is_not_measured_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="metric_for_best_model is eval/acc, but the evaluations have: eval/accuracy"):
        BestModel(tmp_path, "eval/acc", None).is_better({METRIC: 0.5})


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"lora.r": 4}], ids=["full", "lora"])
def test_final_is_the_best_model(tmp_path: Path, lora: dict[str, int]) -> None:
    """eval/length_mean over steps 2, 4, 6: whichever is the largest, final/ has its weights."""
    settings = {"load_best_model_at_end": "true", "metric_for_best_model": "eval/length_mean", "steps": 6}
    rows = run(tmp_path, "run", **settings, **lora, **{"optimizer.learning_rate": 0.02})
    lengths = {row["step"]: row["eval/length_mean"] for row in rows if row["step"] and "eval/length_mean" in row}
    best = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert best["value"] == max(lengths.values()) and lengths[best["step"]] == best["value"]
    final, kept = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("final", "best/final"))
    assert all(torch.equal(final[key], kept[key]) for key in kept)
    assert (tmp_path / "run" / "adapter").is_dir() == bool(lora)
    assert json.loads((tmp_path / "run" / "final" / "training.json").read_text())["step"] == 6
