"""Faults in the environment of a run: a full disk, a hanging tracker, a closed terminal, a long run."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from grpo.config.parser import load_config
from grpo.config.schema import Config, TrackingConfig
from grpo.errors import StorageError
from grpo.policy import Policy
from grpo.run import checkpointer
from grpo.run.checkpoint import load_checkpoint, newest_valid, save_checkpoint
from grpo.runtime.jsonl import LineWriter
from grpo.tracking import background_writer
from grpo.tracking.run_logger import RunLogger
from grpo.trainer import train
from tests.runtime.test_signals import ROOT, rows_of, same_weights
from tests.test_trainer import arguments, run

resource = pytest.importorskip("resource")


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of files of this process, which simulates a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)


def test_lines_wait_for_room_and_none_is_torn_or_doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("grpo.runtime.jsonl.log.warning", warnings.append)
    lines = LineWriter(tmp_path / "a.jsonl")
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
    lines = LineWriter(tmp_path / "a.jsonl")
    with file_size_limit(0):
        lines.add(["one"])
        with pytest.raises(StorageError, match="Its last rows are lost; the weights are not"):
            lines.close()


def fill_disk(monkeypatch: pytest.MonkeyPatch, full: set[int]) -> None:
    """Make the checkpoints of these steps fail for lack of space."""
    save = checkpointer.save_checkpoint

    def limited(run_dir: Path, step: int, *rest: Any) -> Path:
        with file_size_limit(30_000) if step in full else contextlib.nullcontext():
            return save(run_dir, step, *rest)

    monkeypatch.setattr(checkpointer, "save_checkpoint", limited)


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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    record_property: Any,
    at: str,
    calls: list[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb = HangingWandb(at)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with caplog.at_level(logging.WARNING):
        settings = TrackingConfig(report_to=["wandb"])
        assert settings.finish_timeout == 5.0  # what an outage costs a run, and that at its end only
        tracker = RunLogger(tmp_path, Config(tracking=settings), {}, 0)
        began = time.monotonic()
        tracker.log(0, {"x": 1.0})
        tracker.log(1, {"x": 2.0})
        tracker.begin_shutdown()
        record_property("seconds until the end of training", round(time.monotonic() - began, 1))
        tracker.finish()
        record_property("seconds in all", round(time.monotonic() - began, 1))
    assert wandb.calls == calls
    [said] = [record.message for record in caplog.records]
    assert said.startswith(
        f"wandb failed at {'start' if at == 'init' else at} and is switched off: did not answer in time"
    )
    assert (f"to upload it later: wandb sync {tmp_path}/wandb/*run-*" in said) == (at != "init")
    assert ("(tracking.finish_timeout 5 s)" in said) == (at == "finish")
    assert [row["x"] for row in rows_of(tmp_path)] == [1.0, 2.0]
    wandb.never.set()


def test_a_call_that_overstays_is_noticed_while_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_writer, "CALL_SECONDS", 0.0)
    failures: list[tuple[str, BaseException | None]] = []
    started, never = threading.Event(), threading.Event()
    made = background_writer.BackgroundWriter("x", lambda doing, error: failures.append((doing, error)))
    made.submit("start", lambda: (started.set(), never.wait()))
    started.wait()
    made.submit("log", lambda: None)
    made.submit("log", lambda: None)
    assert failures == [("start", None)] and not made.is_alive
    never.set()


def test_a_call_that_never_returns_does_not_hold_up_the_end_of_the_program() -> None:
    """Real W&B with a silent server would wait 90 s at the exit of the interpreter."""
    program = (
        "import atexit, threading\n"
        "from grpo.tracking.background_writer import BackgroundWriter\n"
        "from grpo.errors import GrpoError\n"
        "from grpo.runtime.command import run_main\n"
        "atexit.register(threading.Event().wait)\n"
        "def main():\n"
        "    writer = BackgroundWriter('x', lambda doing, error: print(doing, error))\n"
        "    writer.close(threading.Event().wait)\n"
        "    writer.wait(0.1)\n"
        "    print('done')\n"
        "    if FAILS: raise GrpoError('and this')\n"
        "run_main(main)\n"
    )
    for fails, code in (("False", 0), ("True", 1)):
        words = [sys.executable, "-c", program.replace("FAILS", fails)]
        ended = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (code, "finish None\ndone\n"), ended.stderr


def test_without_a_network_none_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, evaluation and resume with a local model and file open no connection."""
    tried: list[Any] = []
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX:  # the reward workers
            return connect(self, address)
        tried.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    run(tmp_path, "run", steps=4, eval_every=2)
    run(tmp_path, "again", steps=4, eval_every=2, resume=tmp_path / "run" / "checkpoints" / "step-2")
    assert rows_of(tmp_path / "again")[-1]["step"] == 4 and tried == []


def test_too_little_room_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Estimated size equals written size. Space for one checkpoint only: a warning. Less: an error."""
    for name, lora in (("full", {}), ("lora", {"lora.r": 2, "lora.target_modules": "[q_proj]"})):
        sizes: list[tuple[int, int]] = []
        foreseen = Policy.bytes_on_disk

        def noted(policy: Policy, sizes: list = sizes, foreseen: Any = foreseen) -> tuple[int, int]:
            sizes.append(foreseen(policy))
            return sizes[-1]

        with monkeypatch.context() as patch:
            patch.setattr(Policy, "bytes_on_disk", noted)
            run(tmp_path, name, steps=1, eval_every=0, **lora)
        [(checkpoint, final)] = sizes
        tensors = load_checkpoint(tmp_path / name / "checkpoints" / "step-1")[0]
        written = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        counters = 4 * sum(key.endswith(".step") for key in tensors["optimizer"])  # one number for each parameter
        assert checkpoint == written - counters
        model = sum(tensor.nbytes for tensor in load_file(tmp_path / name / "final" / "model.safetensors").values())
        assert model <= final
    capsys.readouterr()

    def free(size: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10**9, free=size))

    free(checkpoint + final)
    run(tmp_path, "tight", steps=1, eval_every=0, **lora)
    assert "MB are free for" in (said := capsys.readouterr().out) and "save_total_limit 10 will not fit" in said
    free(checkpoint + final - 1)
    with pytest.raises(StorageError, match="MB are free for .* this run could not be saved"):
        run(tmp_path, "none", steps=1, eval_every=0, **lora)
    assert not (tmp_path / "none" / "checkpoints").exists()


def test_a_checkpoint_that_will_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"policy": {"weight": torch.ones(1000, 1000)}}
    save_checkpoint(tmp_path, 1, tensors, {}, keep=1)
    for total, free, fits in ((10**9, 3_999_999, False), (10**9, 4_000_000, True), (0, 0, True)):  # 0 of 0: not told
        usage = SimpleNamespace(total=total, free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda path, usage=usage: usage)
        if fits:
            save_checkpoint(tmp_path, 3, tensors, {}, keep=1)
            continue
        with pytest.raises(StorageError, match=r"only 4.0 MB are free\. It needs 4.0 MB of free space"):
            save_checkpoint(tmp_path, 2, tensors, {}, keep=1)
        assert os.listdir(tmp_path / "checkpoints") == ["step-1"]
    assert os.listdir(tmp_path / "checkpoints") == ["step-3"]


def command(shell: str, folder: Path, name: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments(folder, name, steps=2, eval_every=0)]
    quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONUNBUFFERED", None)  # as users have it
    return subprocess.run(
        ["bash", "-c", shell.format(quoted)], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_without_a_terminal_the_weights_are_the_same(tmp_path: Path, record_property: Any) -> None:
    """Standard output and error: on a full disk, closed, a pipe closed after one line, an ASCII locale."""
    run(tmp_path, "normal", steps=2, eval_every=0)
    shells = {
        "full": "{} > /dev/full 2> /dev/full",
        "closed": "{} >&- 2>&-",
        "pipe": "{} | head -n 1 > /dev/null; exit ${{PIPESTATUS[0]}}",
        "ascii": "LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 TERM=dumb {}",
    }
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda name: command(shells[name], tmp_path, name), shells)
    for name, result in zip(shells, results, strict=True):
        assert result.returncode == 0, (name, result.stderr)
        assert same_weights(tmp_path / name, tmp_path / "normal"), name
        assert len(rows_of(tmp_path / name)) == 2
        record_property("the same weights with output", name)


@pytest.mark.slow
def test_300_steps_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    """Memory, open files, threads and processes are equal after 100 and 300 steps, with a line per step."""
    me = psutil.Process()
    seen: dict[int, dict[str, int]] = {}
    log = RunLogger.log

    def logged(self: RunLogger, step: int, *rest: Any, **named: Any) -> None:
        log(self, step, *rest, **named)
        if step % 50 == 0:
            seen[step] = {
                "rss": me.memory_info().rss,
                "files": me.num_fds(),
                "threads": threading.active_count(),
                "processes": len(me.children(recursive=True)),
            }

    monkeypatch.setattr(RunLogger, "log", logged)
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
