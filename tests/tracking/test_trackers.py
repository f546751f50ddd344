"""Trackers: their files hold every number and the completions, read in their own formats."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo.config.schema import Config, TrackingConfig, flatten, to_dict
from grpo.tracking.run_logger import RunLogger
from grpo.tracking.tracker import TrackedRun, completions_table
from grpo.tracking.trackers.wandb import names_of
from tests.test_trainer import run

HOSTILE = "<img src=x onerror=alert(1)> [x](javascript:alert(1)) ``` \x1b[2J"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rollouts(step: int) -> list[dict[str, Any]]:
    judged = {"accuracy": 1.0, "format": float("nan")}
    common = {"step": step, "draw": 0, "prompt": "1+1=", "reward": 0.5, "advantage": 1.0, "length": 3, "ended": True}
    return [common | {"sample": i, "completion": text, "rewards": judged} for i, text in enumerate(["2", HOSTILE])]


def log_four_steps(run_dir: Path, library: str, resume: bool) -> list[dict[str, Any]]:
    """Log steps 0 to 3; with `resume`, log steps 2 and 3 again. Return the rows of metrics.jsonl."""
    config = Config(tracking=TrackingConfig(report_to=[library], project="GRPO test", run_name="one"))
    for first in (0, 2) if resume else (0,):
        tracker = RunLogger(run_dir, config, {"batch_size": 8}, resume_step=first)
        for step in range(first, 4):
            tracker.log(step, {"reward/mean": step / 3, "memory/none": None}, rollouts(step), table=step == 1)
        tracker.finish()
    return rows(run_dir / "metrics.jsonl")


TRACKER = """
from grpo.tracking.tracker import Tracker, register_tracker

@register_tracker("lines")
class Lines(Tracker):
    def log(self, step, metrics, table):
        with open(self.run.run_dir / "lines.txt", "a") as file:
            file.write(f"{self.run.name} {step} {metrics['reward/mean']:.2f} {len(table.rows) if table else 0}\\n")
"""


def test_a_tracker_of_your_own(tmp_path: Path) -> None:
    """Load it by file, and by its registered name after the file is imported."""
    (tmp_path / "my_tracker.py").write_text(TRACKER)
    for name in (f"{tmp_path}/my_tracker.py:Lines", "lines"):
        log_four_steps(tmp_path, name, resume=False)
        assert (tmp_path / "lines.txt").read_text() == "one 0 0.00 0\none 1 0.33 2\none 2 0.67 0\none 3 1.00 0\n"
        for file in tmp_path.glob("*.[jt]*"):
            file.unlink()


def test_tables_have_a_column_for_each_reward() -> None:
    table = completions_table(rollouts(1) * 200)
    assert table.columns[-2:] == ["reward/accuracy", "reward/format"] and len(table.rows) == 256
    assert table.rows[0][:-1] == [1, 0, 0, 0.5, 1.0, 3, True, "1+1=", "2", 1.0]


@pytest.mark.parametrize("resume", [False, True])
def test_tensorboard_holds_metrics_jsonl_and_the_completions(tmp_path: Path, resume: bool) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = log_four_steps(tmp_path, "tensorboard", resume)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    read = {event.step: event.value for event in events.Scalars("reward/mean")}  # float32
    assert read == pytest.approx({row["step"]: row["reward/mean"] for row in written}, rel=1e-6) and len(read) == 4
    [text] = events.Tensors("completions/text_summary")
    markdown = text.tensor_proto.string_val[0].decode()
    assert text.step == 1 and "reward/accuracy 1.0" in markdown
    # The completion's own ``` cannot end the block that it stands in, and its escape sequence is spelled out.
    assert f"````text\n1+1=\n---\n{HOSTILE[:-4]}\\x1b[2J\n````" in markdown


def test_a_whole_run_in_tensorboard_equals_metrics_jsonl(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    extra = {"tracking.report_to": "[tensorboard]", "tracking.log_completions": "true", "steps": 3}
    written = run(tmp_path, "run", **extra)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    read: dict[int, dict[str, Any]] = {row["step"]: {"step": row["step"]} for row in written}
    assert events.Tags()["tensors"] == ["completions/text_summary"]
    for key in events.Tags()["scalars"]:
        for event in events.Scalars(key):
            read[event.step][key] = event.value
    for row, logged in zip(read.values(), written, strict=True):
        assert row == pytest.approx(logged, rel=1e-6)
    assert [event.step for event in events.Tensors("completions/text_summary")] == [1, 2, 3]


def test_wandb_offline_holds_every_step_and_the_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    written = log_four_steps(tmp_path / "run", "wandb", resume=True)
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    # offline-run-TIME-ID, and -1 behind it where both runs began in one second
    identities = {folder.name.split("-")[3] for folder in folders}
    assert len(identities) == 1  # the resumed run went on under the id of the first
    history: dict[int, float] = {}
    for file in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                history[record.history.step.num] = json.loads(items["reward/mean"])
    assert history == {row["step"]: row["reward/mean"] for row in written} and len(history) == 4
    [table] = {path.read_text() for path in (tmp_path / "run" / "wandb").glob("*/files/media/table/*.json")}
    stored = json.loads(table)
    assert stored["columns"] == completions_table(rollouts(1)).columns
    assert [row[8] for row in stored["data"]] == ["2", HOSTILE] and stored["data"][0][-1] is None


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum, length, kind, bytes)."""
    from wandb.proto import wandb_internal_pb2

    data, offset, whole = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        whole += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@pytest.mark.parametrize("resume", [False, True])
def test_trackio_holds_every_step_once_and_the_completions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    trackio = pytest.importorskip("trackio", reason='pip install -e ".[trackio]"')
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    written = log_four_steps(tmp_path / "run", "trackio", resume)
    assert list((tmp_path / "trackio").glob("*.db"))
    assert trackio.Api().runs("GRPO test")[0].config["batch_size"] == 8
    stored = sqlite_storage.SQLiteStorage.get_logs("GRPO test", "one")
    assert [(row["step"], row["reward/mean"]) for row in stored] == [
        (row["step"], row["reward/mean"]) for row in written
    ]
    [table] = [row["completions"]["_value"] for row in stored if "completions" in row]
    assert table[0]["completion"] == "2" and table[0]["reward/format"] is None
    assert table[1]["completion"].startswith("&lt;img src=x") and "\x1b" not in table[1]["completion"]


def test_names_from_the_environment_of_wandb_win_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(**settings: Any) -> dict[str, str | None]:
        config = flatten(to_dict(Config(tracking=TrackingConfig(**settings))))
        project, name = config["tracking.project"], config["tracking.run_name"] or "model-data-time"
        return names_of(TrackedRun(tmp_path, project, name, config))

    for variable in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(variable, raising=False)
    assert names() == {"project": "GRPO-Fine-Tuning", "name": "model-data-time", "group": None}
    for variable, value in {"WANDB_PROJECT": "p", "WANDB_NAME": "n", "WANDB_RUN_GROUP": "g"}.items():
        monkeypatch.setenv(variable, value)
    assert names() == {"project": "p", "name": "n", "group": "g"}
    assert names(project="mine", run_name="run") == {"project": "mine", "name": "run", "group": "g"}
