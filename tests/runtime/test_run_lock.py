"""The lock of a run directory where flock is missing or does not reach: the owner file and its heartbeat."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo.errors import ConfigError
from grpo.runtime import run_lock
from grpo.runtime.run_lock import LockLost, RunLock, check_free


@pytest.fixture(autouse=True)
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre without -o flock."""

    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(run_lock, "SILENT_SECONDS", 0.5)


def owner_elsewhere(folder: Path, age: float = 0.0) -> Path:
    """Write the file of an owner on another machine."""
    path = folder / ".owner"
    path.write_text(json.dumps({"pid": 7, "host": "node7", "started": 1.0, "machine": "other", "token": "theirs"}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_second_lock_is_refused_and_the_first_can_be_released(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    for refused in (lambda: RunLock(tmp_path), lambda: check_free(tmp_path)):
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "):
            refused()
    lock.check()
    lock.release()
    lock.release()
    check_free(tmp_path)
    RunLock(tmp_path).release()
    assert os.listdir(tmp_path) == [".lock"]


def test_an_owner_that_died_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    """Its process is gone, or the number belongs to another process by now."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock = RunLock(tmp_path)
    mine = json.loads((tmp_path / ".owner").read_text())
    lock.release()
    for pid, started in ((gone.pid, mine["started"]), (os.getpid(), mine["started"] - 1000)):
        (tmp_path / ".owner").write_text(json.dumps(mine | {"pid": pid, "started": started}))
        lock = RunLock(tmp_path)
        owner = json.loads((tmp_path / ".owner").read_text())
        assert (owner["pid"], owner["started"]) == (os.getpid(), mine["started"])
        lock.release()


def test_an_owner_elsewhere_holds_while_its_heart_beats(tmp_path: Path) -> None:
    path, end = owner_elsewhere(tmp_path), threading.Event()

    def beat() -> None:
        while not end.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="in use by process 7 on node7"):
            RunLock(tmp_path)
    finally:
        end.set()
        thread.join()
    RunLock(tmp_path).release()  # silent now


def test_an_owner_that_has_been_silent_for_long_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner_elsewhere(tmp_path, age=3600)
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: pytest.fail("it waits"))
    lock = RunLock(tmp_path)
    assert json.loads((tmp_path / ".owner").read_text())["pid"] == os.getpid()
    lock.release()


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
    lock = RunLock(tmp_path)
    os.utime(tmp_path / ".owner", (1, 1))
    end = time.monotonic() + 30
    while (tmp_path / ".owner").stat().st_mtime == 1:
        assert time.monotonic() < end
        time.sleep(0.01)
    lock.release()


def test_a_lock_that_another_process_took_is_noticed_and_not_given_back(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    owner_elsewhere(tmp_path)
    with pytest.raises(LockLost, match="taken over by process 7 on node7"):
        lock.check()
    assert LockLost("").exit_code == 3
    lock.release()
    assert (tmp_path / ".owner").exists()
