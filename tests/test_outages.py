"""What fails around a run costs the run nothing: a full disk, a tracker that hangs, a terminal that is gone, a long night."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo import courier, setup
from grpo.checkpoint import newest_valid
from grpo.config import Config, TrackingConfig, load_config
from grpo.errors import StorageError
from grpo.lines import Lines
from grpo.tracking import Tracker
from grpo.trainer import train
from tests.test_signals import ROOT, rows_of, same_weights
from tests.test_trainer import arguments, run

resource = pytest.importorskip("resource")


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The operating system refuses every byte of a file beyond `size`: a full disk, for one process."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)


def test_lines_wait_for_room_and_none_is_torn_or_doubled(tmp_path: Path) -> None:
    warnings: list[str] = []
    lines = Lines(tmp_path / "a.jsonl", warnings.append)
    lines.add(["one"])
    with file_size_limit(6):  # "one" and its end, and two letters of the next
        lines.add(["two"])
        lines.add(["three"])
        assert (tmp_path / "a.jsonl").read_text() == "one\ntw"
    assert len(warnings) == 1 and "a.jsonl" in warnings[0] and "Training goes on" in warnings[0]
    lines.add(["four"])
    lines.close()
    assert (tmp_path / "a.jsonl").read_text() == "one\ntwo\nthree\nfour\n"
    lines.close()


def test_lines_that_never_found_room_are_an_error_at_the_end(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a.jsonl", lambda text: None)
    with file_size_limit(0):
        lines.add(["one"])
        with pytest.raises(StorageError, match="Its last rows are lost; the weights are not"):
            lines.close()


def fill_disk(monkeypatch: pytest.MonkeyPatch, full: set[int]) -> None:
    """No checkpoint of these steps has room."""
    save = setup.save_checkpoint

    def limited(run_dir: Path, step: int, *rest: Any) -> Path:
        with file_size_limit(30_000) if step in full else contextlib.nullcontext():
            return save(run_dir, step, *rest)

    monkeypatch.setattr(setup, "save_checkpoint", limited)


def test_a_full_disk_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "whole", steps=4)
    with monkeypatch.context() as patch:
        fill_disk(patch, {2, 3})
        run(tmp_path, "full", steps=4, save_total_limit=1)
    assert same_weights(tmp_path / "full", tmp_path / "whole")
    assert rows_of(tmp_path / "full") == rows_of(tmp_path / "whole")
    assert capsys.readouterr().out.count("older checkpoints are untouched") == 2
    assert os.listdir(tmp_path / "full" / "checkpoints") == ["step-4"]


def test_a_last_save_that_fails_is_exit_code_3_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fill_disk(patch, {2, 3})
        with pytest.raises(StorageError, match=r"step-3: .*older checkpoints are untouched") as caught:
            train(load_config(arguments(tmp_path, "run", steps=3, eval_every=0, save_total_limit=1)))
    assert caught.value.exit_code == 3
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-1"]
    assert newest_valid(tmp_path / "run")[0] == tmp_path / "run" / "checkpoints" / "step-1"
    run(tmp_path, "run", steps=3, eval_every=0, resume="auto")
    run(tmp_path, "whole", steps=3, eval_every=0)
    assert same_weights(tmp_path / "run", tmp_path / "whole")


class HangingWandb:
    """wandb's interface; a call named `at` never returns."""

    def __init__(self, at: str):
        self.at, self.calls, self.never = at, [], threading.Event()

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.at:
            self.never.wait()

    def init(self, **arguments: Any) -> "HangingWandb":
        self._called("init")
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._called("log")

    def finish(self) -> None:
        self._called("finish")

    def __getattr__(self, name: str) -> Any:  # define_metric, Table, ...: whatever else a tracker asks for
        return lambda *arguments, **named: None


@pytest.mark.parametrize(
    ("at", "calls"), [("init", ["init"]), ("log", ["init", "log"]), ("finish", ["init", "log", "log", "finish"])]
)
def test_a_tracker_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str, calls: list[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(courier, "CLOSE_SECONDS", 2.0)
    wandb = HangingWandb(at)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(tmp_path, Config(tracking=TrackingConfig(report_to=["wandb"])), {}, 0)
        tracker.log(0, {"x": 1.0})
        tracker.log(1, {"x": 2.0})
        tracker.finish()
    assert wandb.calls == calls
    assert [record.message.split(".")[0] for record in caplog.records] == [
        f"wandb failed at {'start' if at == 'init' else at} and is switched off: did not answer in time"
    ]
    assert [row["x"] for row in rows_of(tmp_path)] == [1.0, 2.0]
    wandb.never.set()


def test_a_call_that_overstays_is_noticed_while_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "CALL_SECONDS", 0.0)
    failures: list[tuple[str, BaseException | None]] = []
    started, never = threading.Event(), threading.Event()
    made = courier.Courier("x", lambda doing, error: failures.append((doing, error)))
    made.post("start", lambda: (started.set(), never.wait()))
    started.wait()
    made.post("log", lambda: None)
    made.post("log", lambda: None)
    assert failures == [("start", None)] and not made.alive
    never.set()


def command(shell: str, folder: Path, name: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments(folder, name, steps=2, eval_every=0)]
    quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", shell.format(quoted)], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_without_a_terminal_the_weights_are_the_same(tmp_path: Path) -> None:
    """Standard output and error on a full disk; closed; a pipe that is closed after a line; an ASCII locale."""
    run(tmp_path, "normal", steps=2, eval_every=0)
    shells = {
        "full": "{} > /dev/full 2> /dev/full",
        "closed": "{} >&- 2>&-",
        "pipe": "{} | head -n 1 > /dev/null; exit ${{PIPESTATUS[0]}}",
        "ascii": "LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 TERM=dumb {}",
    }
    for name, shell in shells.items():
        result = command(shell, tmp_path, name)
        assert result.returncode == 0, (name, result.stderr)
        assert same_weights(tmp_path / name, tmp_path / "normal"), name
        assert len(rows_of(tmp_path / name)) == 2


@pytest.mark.slow
def test_300_steps_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    """Memory, open files, threads and processes after 100 steps and after 300; a line per step."""
    me = psutil.Process()
    seen: dict[int, dict[str, int]] = {}
    log = Tracker.log

    def logged(self: Tracker, step: int, *rest: Any, **named: Any) -> None:
        log(self, step, *rest, **named)
        if step % 50 == 0:
            seen[step] = {
                "rss": me.memory_info().rss,
                "files": me.num_fds(),
                "threads": threading.active_count(),
                "processes": len(me.children(recursive=True)),
            }

    monkeypatch.setattr(Tracker, "log", logged)
    rows = run(
        tmp_path, "run", steps=300, eval_every=0, save_every=50, save_total_limit=2, prompts_per_step=1,
        **{"sampling.num_generations": 2, "sampling.max_completion_length": 4},
    )  # fmt: skip
    assert [row["step"] for row in rows] == list(range(1, 301))
    slope = (seen[300]["rss"] - seen[100]["rss"]) / 200
    record_property("bytes of memory per step", round(slope))
    assert slope < 20_000
    for kind in ("files", "threads", "processes"):
        assert seen[300][kind] <= seen[100][kind], kind
    assert not [child for child in me.children(recursive=True) if child.status() == psutil.STATUS_ZOMBIE]
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-250", "step-300"]
