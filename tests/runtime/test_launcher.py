"""The end of the launcher: each process below it notices, and stops as after SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo.errors import Interrupted
from grpo.runtime import launcher, signals
from grpo.runtime.launcher import is_launcher, shutdown_seconds
from grpo.runtime.signals import Signals

ROOT = Path(__file__).parents[2]
TRAINER = """
import json, sys, time
from grpo.runtime.signals import Signals
with Signals() as signals:
    signals.training = True
    open(sys.argv[1] + ".ready", "w").close()
    end = time.monotonic() + 60
    while not signals.received and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(float(sys.argv[2]))  # the step ends, and is saved
open(sys.argv[1], "w").write(json.dumps(signals.received))
"""
LAUNCHER = """
import subprocess, sys, threading
command = [sys.executable, "-c", sys.argv[1], sys.argv[2], sys.argv[3]]
if sys.argv[4] == "shell":
    command = ["sh", "-c", '"$@"; exit', "sh", *command]
started = []
thread = threading.Thread(target=lambda: started.append(subprocess.Popen(command)))
if sys.argv[4] == "thread":  # Linux then sends the death signal at the end of the thread
    thread.start()
    thread.join()
else:
    started.append(subprocess.Popen(command))
started[0].wait()
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/usr/bin/python", "/venv/bin/accelerate", "launch", "train.py"], True),
        (["python", "-m", "accelerate.commands.launch", "train.py"], True),
        (["python", "/x/site-packages/accelerate/commands/launch.py", "train.py"], True),
        (["python", "-u", "-m", "torch.distributed.run", "train.py"], True),
        (["python3", "/venv/bin/torchrun", "train.py"], True),
        (["bash", "-c", "accelerate launch launch/train.py"], False),
        (["python", "launch/train.py"], False),
        (["python", "/home/accelerate/train.py"], False),
        ([], False),
    ],
)
def test_what_is_a_launcher(words: list[str], expected: bool) -> None:
    assert is_launcher(words) is expected


@pytest.mark.parametrize("kind", ["direct", "shell", "thread"])
def test_the_end_of_the_launcher_is_noticed(tmp_path: Path, kind: str) -> None:
    """SIGKILL to the launcher alone: of the process itself, of a shell's, and of one that a thread has started."""
    (tmp_path / "accelerate").write_text(LAUNCHER)
    result = tmp_path / "received"
    command = [sys.executable, str(tmp_path / "accelerate"), TRAINER, str(result), "0", kind]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "received.ready")
    time.sleep(0.1)
    assert not result.exists()  # the end of the thread is not that of the launcher
    process.kill()
    process.wait()
    wait_for(result)
    assert json.loads(result.read_text()) == signal.SIGTERM
    assert process.stderr is not None
    assert f"the launcher (process {process.pid}) has ended" in process.stderr.read()


def test_the_end_of_the_launcher_after_a_signal_cuts_nothing_short(tmp_path: Path) -> None:
    """Ctrl-C goes to both; the launcher ends a while later, and the save takes longer than that."""
    (tmp_path / "accelerate").write_text(LAUNCHER)
    result = tmp_path / "received"
    command = [sys.executable, str(tmp_path / "accelerate"), TRAINER, str(result), "2.5", "direct"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    wait_for(tmp_path / "received.ready")
    [trainer] = map(int, subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(process.pid)]).split())
    os.kill(trainer, signal.SIGINT)
    time.sleep(1.2)
    process.kill()
    process.wait()
    wait_for(result)
    assert json.loads(result.read_text()) == signal.SIGINT


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists() or (path.name == "received" and not path.read_text()):
        assert time.monotonic() < end, path
        time.sleep(0.02)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch no launcher, and count every signal: tests send several within a second."""
    monkeypatch.setattr(launcher, "find_launcher", lambda: None)
    monkeypatch.setattr(signals, "ECHO_SECONDS", 0.0)
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_that_schedulers_send_stops_the_run_once(name: str) -> None:
    number = getattr(signal, name)
    with Signals() as caught:
        caught.training = True
        for again in (number, number, signal.SIGTERM):  # SIGXCPU comes every second, SIGTERM later
            os.kill(os.getpid(), again)
        assert caught.received == number
    assert Interrupted(number, "").exit_code == 143


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("environment", "received"),
    [
        ({}, 0),
        ({"TORCHELASTIC_RUN_ID": "x"}, signal.SIGHUP),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT"}, 0),
    ],
)
def test_nohup(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], received: int) -> None:
    """torchrun handles SIGHUP whatever nohup says, and kills its workers 30 s later: they have to save."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as caught:
            caught.training = True
            os.kill(os.getpid(), signal.SIGHUP)
            assert caught.received == received
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("alone")
def test_outside_a_command_a_second_interrupt_raises_and_the_process_stays() -> None:
    """As the stop button of a notebook, pressed twice."""
    with pytest.raises(KeyboardInterrupt), Signals() as caught:
        caught.training = True
        os.kill(os.getpid(), signal.SIGINT)
        assert caught.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_a_launcher_that_was_gone_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_FIRST_PARENT", -1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="the launcher has ended before the first step"), Signals():
        pass
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"TORCHELASTIC_RUN_ID": "x"}, 30.0),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, 90.0),
    ],
)
def test_the_seconds_that_torchrun_leaves(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], seconds: float | None
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert shutdown_seconds() == seconds
