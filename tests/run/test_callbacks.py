"""Callbacks add metrics and never stop a run."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch

from grpo.errors import ConfigError
from grpo.models.weights import WeightReader
from grpo.run.callbacks import build_callbacks, layer_norms
from tests.test_trainer import run

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_documented_five_lines_add_a_metric(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 5
    (tmp_path / "my_callbacks.py").write_text(code)
    rows = run(tmp_path, "run", callbacks=json.dumps([f"{tmp_path}/my_callbacks.py:Digits"]), eval_every=0, steps=2)
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        texts = [rollout["completion"] for rollout in rollouts if rollout["step"] == row["step"]]
        assert row["my/digits"] == sum(c.isdigit() for text in texts for c in text) / len(texts)
    assert [row["step"] for row in rows] == [1, 2] and any(row["my/digits"] for row in rows)


RECORDER = """
from pathlib import Path
from grpo.run.callbacks import Callback

def note(state, word):
    with Path(state.run_dir, "moments").open("a") as file:
        print(word, state.step, len(state.rows), file=file)

class Recorder(Callback):
    def on_train_begin(self, state):
        note(state, "begin")
    def on_step_begin(self, state):
        note(state, "before")
    def on_save(self, state):
        note(state, "saved")
    def on_step_end(self, state, metrics):
        note(state, "step")
        metrics["my/seen"] = metrics["reward/mean"] * 2
    def on_evaluate(self, state, metrics):
        note(state, "evaluate")
        metrics["my/error"] = 1 - metrics["eval/accuracy"]
        assert sum(row["accuracy"] for row in state.evaluated) / len(state.evaluated) == metrics["eval/accuracy"]
    def on_train_end(self, state):
        note(state, "end")

class Stopping(Callback):
    def on_step_end(self, state, metrics):
        self.save = state.step == 1
        self.stop = state.step == 2

class Second(Callback):
    def on_step_end(self, state, metrics):
        metrics["my/second"] = metrics["my/seen"] + 1  # an earlier one's metric is there

class Failing(Callback):
    def on_step_end(self, state, metrics):
        metrics["my/half"] = 1.0
        if state.step == 2:
            raise RuntimeError("outage")

class Changing(Callback):
    def on_step_end(self, state, metrics):
        metrics["reward/mean"] = 1.0

class Text(Callback):
    def on_step_end(self, state, metrics):
        metrics["my/text"] = "high"

class Misspelt(Callback):
    def on_step_ended(self, state, metrics):
        pass

class Needy(Callback):
    def __init__(self, path):
        pass

def function(state):
    pass
"""


def test_moments_and_order(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RECORDER)
    rows = run(
        tmp_path,
        "run",
        callbacks=json.dumps([f"{tmp_path}/mine.py:Recorder", f"{tmp_path}/mine.py:Second"]),
        steps=2,
        save_every=0,
    )
    moments = (tmp_path / "run" / "moments").read_text().splitlines()
    before = ["begin 0 0", "evaluate 0 0", "before 0 0", "step 1 12", "before 1 0", "step 2 12"]
    assert moments == [*before, "evaluate 2 12", "saved 2 0", "end 2 0"]
    assert "my/seen" not in rows[0] and rows[0]["my/error"] == 1 - rows[0]["eval/accuracy"]
    assert all(row["my/second"] == row["my/seen"] + 1 == 2 * row["reward/mean"] + 1 for row in rows[1:])


def test_a_callback_saves_and_stops(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RECORDER)
    names = json.dumps([f"{tmp_path}/mine.py:Stopping"])
    rows = run(tmp_path, "run", callbacks=names, eval_every=0, save_every=0, steps=4, save_total_limit=3)
    assert [row["step"] for row in rows] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-1", "step-2"]
    assert json.loads((tmp_path / "run" / "final" / "training.json").read_text())["step"] == 2


def test_a_callback_that_fails_is_switched_off_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.py").write_text(RECORDER)
    names = [f"{tmp_path}/mine.py:{name}" for name in ("Failing", "Changing", "Text", "Recorder")]
    with caplog.at_level(logging.WARNING, logger="grpo.run.callbacks"):
        rows = run(tmp_path, "run", callbacks=json.dumps(names), eval_every=0, steps=4)
    assert [row.get("my/half") for row in rows] == [1.0, None, None, None]
    assert all("my/text" not in row and "my/seen" in row for row in rows)
    assert not all(row["reward/mean"] == 1.0 for row in rows)
    assert len(caplog.records) == 3
    assert "RuntimeError: outage" in caplog.text and "changed 'reward/mean'" in caplog.text


@pytest.mark.parametrize(
    "name, message",
    [
        ("Misspelt", "on_step_ended, which is not a supported hook: on_train_begin, on_step_begin"),
        ("Needy", "cannot be created without arguments"),
        ("function", "not a subclass of"),
        ("Missing", "has no 'Missing'"),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_loads(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(RECORDER)
    with pytest.raises(ConfigError, match=message):
        build_callbacks([f"{tmp_path}/mine.py:{name}"])


def test_layer_norms_by_hand() -> None:
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(1, 2), "layers": torch.nn.ModuleList([torch.nn.Linear(1, 2), torch.nn.Identity()])}
    )
    model["embed"].weight.grad = torch.tensor([[3.0, 4.0]])
    model["layers"][0].weight.grad = torch.tensor([[2.0], [3.0]])
    model["layers"][0].bias.grad = torch.tensor([6.0, 0.0])  # 4 + 9 + 36 = 49
    assert {layer: float(norm) for layer, norm in layer_norms(model, WeightReader()).items()} == {
        "embed": 5.0,
        "layer_00": 7.0,
    }


def test_layer_gradient_norms_are_those_of_the_clipped_gradient(tmp_path: Path) -> None:
    extra = {"callbacks": "[layer_gradient_norms]", "eval_every": 0, "steps": 2, "optimizer.max_grad_norm": 0.001}
    rows = run(tmp_path, "run", **extra)
    for row in rows:
        layers = {key: value for key, value in row.items() if key.startswith("gradient/")}
        names = ["embed_tokens", "layer_00", "layer_01", "norm", "lm_head"]
        assert list(layers) == [f"gradient/{name}" for name in names]
        clipped = min(row["policy/grad_norm"], 0.001)  # 0 where every group was flat
        assert sum(value**2 for value in layers.values()) ** 0.5 == pytest.approx(clipped, rel=1e-3)
    assert any(row["policy/grad_norm"] > 0.001 for row in rows)
