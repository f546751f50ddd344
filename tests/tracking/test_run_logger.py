"""The run directory has each step once. A tracker or terminal that fails does not stop a run."""

import io
import json
import logging
import subprocess
import sys
import types
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config.parser import load_config
from grpo.config.schema import Config, TrackingConfig
from grpo.errors import ConfigError, StorageError
from grpo.runtime.messages import visible
from grpo.tools.score_completions import score_rows
from grpo.tracking.console import Display
from grpo.tracking.rollout_reader import rows_of_step, search, with_columns
from grpo.tracking.run_dir import choose_run_dir
from grpo.tracking.run_logger import RunLogger
from grpo.tracking.tracker import CompletionsTable, Tracker, check_trackers

NOW = datetime(2026, 1, 2, 3, 4, 5)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def quiet() -> Config:
    return Config(tracking=TrackingConfig(report_to=[]))


def test_run_dir_is_named_after_model_data_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = quiet()
    config.model.name = "Qwen/Qwen3-0.6B"
    assert choose_run_dir(config, NOW) == Path("outputs/Qwen3-0.6B-gsm8k-20260102-030405")
    config.tracking.run_name = "../my run: 2"
    assert choose_run_dir(config, NOW) == Path("outputs/my-run-2")
    config.run_dir = "here"
    assert choose_run_dir(config, NOW) == Path("here")


def test_a_folder_with_a_run_is_refused_unless_resumed(tmp_path: Path) -> None:
    config = quiet()
    config.run_dir = str(tmp_path)
    assert choose_run_dir(config, NOW) == tmp_path
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="--resume auto"):
        choose_run_dir(config, NOW)
    config.resume = "auto"
    assert choose_run_dir(config, NOW) == tmp_path


def test_resume_drops_the_rows_that_will_be_made_again(tmp_path: Path) -> None:
    tracker = RunLogger(tmp_path, quiet(), {}, resume_step=0)
    for step in range(4):
        rows_of_step = [{"step": step, "completion": "a"}, {"step": step, "completion": "b"}]
        tracker.log(step, {"reward/mean": step / 2}, rows_of_step)
    tracker.finish()
    tracker.finish()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "rew')  # killed while writing

    tracker = RunLogger(tmp_path, quiet(), {}, resume_step=2)
    tracker.log(2, {"reward/mean": 9.0})
    tracker.finish()
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 0, "reward/mean": 0.0},
        {"step": 1, "reward/mean": 0.5},
        {"step": 2, "reward/mean": 9.0},
    ]
    assert [row["step"] for row in rows(tmp_path / "rollouts.jsonl")] == [0, 0, 1, 1]


def test_what_json_cannot_hold_becomes_null_or_a_number(tmp_path: Path) -> None:
    tracker = RunLogger(tmp_path, quiet(), {}, resume_step=0)
    metrics = {"a": float("nan"), "b": torch.tensor(float("inf")), "c": torch.tensor(2.0), "d": None}
    tracker.log(0, metrics, [{"step": 0, "rewards": {"x": float("-inf")}, "at": NOW, "text": "\u2028\ud800"}])
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 0, "a": None, "b": None, "c": 2.0, "d": None}]
    [row] = rows(tmp_path / "rollouts.jsonl")
    assert row == {"step": 0, "rewards": {"x": None}, "at": "2026-01-02 03:04:05", "text": "\u2028\ud800"}


@pytest.mark.parametrize("name", ["5e6", "007", "1.0", "no: [x]", "naïve"])
def test_config_yaml_reloads_to_the_same_config(tmp_path: Path, name: str) -> None:
    config = load_config(["--steps", "3", "--optimizer.learning_rate", "5e-6", "--rewards", '{"a.b:c": 0.5}'])
    config.tracking = TrackingConfig(report_to=[], run_name=name)
    config.run_dir = str(tmp_path)
    RunLogger(tmp_path, config, {}, resume_step=0).finish()
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_environment_names_versions_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    RunLogger(tmp_path, quiet(), {}, resume_step=0).finish()
    text = (tmp_path / "environment.json").read_text()
    assert json.loads(text)["versions"]["torch"].startswith("2.")
    assert "very-secret" not in text


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="--run_dir"):
        RunLogger(tmp_path / "file", quiet(), {}, resume_step=0)


def test_a_missing_library_is_named_with_its_install_command() -> None:
    check_trackers(quiet())
    with pytest.raises(ConfigError, match="pip install no-such-tracker"):
        check_trackers(Config(tracking=TrackingConfig(report_to=[f"{__file__}:NotInstalled"])))
    with pytest.raises(ConfigError, match=r"tracking.report_to has '.*:quiet', which is not a subclass of .*Tracker"):
        check_trackers(Config(tracking=TrackingConfig(report_to=[f"{__file__}:quiet"])))
    with pytest.raises(ConfigError, match="unknown tracker 'wanbd': did you mean 'wandb'"):
        check_trackers(Config(tracking=TrackingConfig(report_to=["wanbd"])))


class NotInstalled(Tracker):
    library = "no-such-tracker"

    def log(self, step: int, metrics: Mapping[str, float], table: CompletionsTable | None) -> None:
        raise AssertionError


class FakeWandb(types.ModuleType):
    """wandb's interface. It raises in the given call."""

    def __init__(self, fails_at: str) -> None:
        super().__init__("wandb")
        self.Table = dict
        self.fails_at, self.calls, self.arguments = fails_at, [], {}

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_at:
            raise RuntimeError("outage")

    def init(self, **arguments: Any) -> "FakeWandb":
        self.arguments = arguments
        self._called("init")
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._called("log")

    def finish(self) -> None:
        self._called("finish")


@pytest.mark.parametrize(
    "fails_at, calls",
    [("", ["init", "log", "log", "finish"]), ("init", ["init"]), ("log", ["init", "log"])]
    + [("finish", ["init", "log", "log", "finish"])],
)
def test_a_tracker_that_raises_is_switched_off_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails_at: str, calls: list[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = FakeWandb(fails_at)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with caplog.at_level(logging.WARNING):
        tracker = RunLogger(tmp_path, Config(tracking=TrackingConfig(report_to=["wandb"])), {"batch_size": 64}, 0)
        tracker.log(0, {"x": 1.0})
        tracker.log(1, {"x": 2.0})
        tracker.finish()
    assert fake.calls == calls
    assert len(caplog.records) == (1 if fails_at else 0)
    assert len(rows(tmp_path / "metrics.jsonl")) == 2
    assert fake.arguments["project"] == "GRPO-Fine-Tuning" and fake.arguments["mode"] == "online"
    wanted = {"learning_rate": 1e-6, "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.0, "warmup_ratio": 0.0}
    assert {**fake.arguments["config"], **wanted, "batch_size": 64} == fake.arguments["config"]


def test_without_a_key_wandb_is_offline_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = FakeWandb("")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    RunLogger(tmp_path, Config(tracking=TrackingConfig(report_to=["wandb"])), {}, 0).finish()
    assert fake.arguments["mode"] == "offline"


def test_control_characters_are_shown_not_obeyed() -> None:
    assert visible("a\x1b[2J\r\x9b\u202e\nb") == "a\\x1b[2J\\r\\x9b\\u202e\nb"


def test_plain_lines_and_inert_markup(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(total_steps=10, start=0)
    for step in (1, 2, 10):  # the second comes within 5 seconds of the first
        display.step(step, {"reward/mean": 0.5, "rollout/length_mean": 7.0})
    display.completions([{"step": 1, "prompt": "p", "completion": "[red]x[/red]\x1b]52;", "reward": 1.0}] * 5)
    display.table({"eval/accuracy": 0.25}, {"eval/accuracy": 0.5}, "outputs/x")
    out = capsys.readouterr().out
    assert out.count("step 1/10: reward 0.500, length 7") == 1 and "step 2/10" not in out and "step 10/10" in out
    assert out.count("[red]x[/red]\\x1b]52;") == 1 and "\x1b" not in out
    assert "+0.250" in out and "outputs/x" in out


def test_other_processes_print_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    display = Display(2, 0, enabled=False)
    display.step(1, {})
    logging.getLogger("grpo").info("x")
    display.table({}, {}, "x")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [OSError(28, "full"), BrokenPipeError(), ValueError("closed file")])
def test_a_broken_stdout_stops_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr(sys, "stdout", Broken())
    display = Display(2, 0)
    display.step(1, {"reward/mean": 0.5})
    logging.getLogger("grpo").info("x")
    assert not display.enabled


@pytest.mark.parametrize("shell", ["{} > /dev/full", "{} | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}", "{} >&-"])
def test_exit_code_stays_0_when_stdout_is_gone(shell: str) -> None:
    program = (
        "import logging; from grpo.tracking.console import Display; d = Display(9); "
        "[logging.getLogger('grpo').info('x' * 9999) for _ in range(99)]; d.step(1, {})"
    )
    command = shell.format(f'"{sys.executable}" -c "{program}"')
    result = subprocess.run(["bash", "-c", command], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_columns_of_a_prompt_are_written_once_without_binary(tmp_path: Path) -> None:
    """Readers get them in each row, from a step, from a search, and from files of older runs."""
    columns = {"answer": "4", "image": b"x" * 100_000, "pixels": torch.zeros(64, 64), "few": torch.ones(2)}
    made = [
        {"step": step, "draw": 2 * step + p, "sample": s, "prompt": "q", "completion": f"c{s}", "columns": columns}
        for step in (1, 2)
        for p in (0, 1)
        for s in range(4)
    ]
    logger = RunLogger(tmp_path, quiet(), {}, 0)
    for step in (1, 2):
        logger.log(step, {}, [row for row in made if row["step"] == step])
    logger.finish()
    path = tmp_path / "rollouts.jsonl"
    assert path.stat().st_size < 4_000
    assert [("columns" in row) for row in rows(path)] == [True, False, False, False] * 4
    expected = {"answer": "4", "image": "<100000 bytes>", "pixels": "<Tensor of shape (64, 64)>", "few": [1.0, 1.0]}
    assert [row["columns"] for row in rows_of_step(path, 2)] == [expected] * 8
    found, _ = search(path, 2, 1, lambda rows: [row for row in rows if row["completion"] == "c3"], 10)
    assert len(found) == 4 and all(row["columns"] == expected for row in found)
    [scored] = score_rows(Config(rewards={"exact_match": 1.0}), with_columns(rows(path))[1:2])
    assert scored["columns"] == expected
    old = [{**row, "columns": {"answer": str(row["draw"])}} for row in rows(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert rows_of_step(path, 1) == [row for row in old if row["step"] == 1]
