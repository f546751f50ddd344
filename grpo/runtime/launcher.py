"""Launcher: the `accelerate launch`, torchrun or deepspeed process above this one, and the watch for its end.

A launcher that is killed takes no process with it: each rank notices the loss itself (grpo/runtime/signals.py).
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

POLL_SECONDS = 1.0
_PROGRAMS = {"accelerate", "accelerate-launch", "torchrun", "deepspeed"}
_MODULES = {
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
}
_FIRST_PARENT = os.getppid()
"""Parent at the import of this module, before torch is imported: the launcher may end meanwhile."""
DEATH_SIGNAL = getattr(signal, "SIGRTMAX", None) and signal.SIGRTMAX - 2
"""Signal that Linux sends when the launcher ends. None elsewhere. Other programs do not send it, so it never counts as
a second request to stop."""
_PR_SET_PDEATHSIG = 1


def is_launcher(words: list[str]) -> bool:
    """Return whether a command line is that of a launcher."""
    return any(
        Path(word).name.removesuffix(".exe") in _PROGRAMS
        or (before == "-m" and word in _MODULES)
        or any(word.endswith(f"/{module.replace('.', '/')}.py") for module in _MODULES)
        for before, word in zip(["", *words], words[:5], strict=False)
    )


def find_launcher() -> psutil.Process | None:
    """Return the nearest launcher among the processes above this one. None: started by hand, or by another program."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            with contextlib.suppress(psutil.Error):
                if is_launcher(process.cmdline()):
                    return process
    return None


def launcher_is_gone() -> bool:
    """Return whether this process had a launcher that ended before it was looked for."""
    launched = any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))
    return launched and os.getppid() != _FIRST_PARENT


def shutdown_seconds() -> float | None:
    """Return the seconds that torchrun leaves its workers after a signal. None: another launcher, or none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or 30)
    except ValueError:
        return 30.0


class LauncherWatch:
    """Calls `lost` once, in any thread, when the launcher has ended.

    Linux reports the end of a parent by DEATH_SIGNAL, whose handler calls `look`. A thread looks every second, which
    also covers a launcher further up, and other systems.
    """

    def __init__(self, lost: Callable[[int], None]) -> None:
        self._lost = lost
        self._launcher = find_launcher()
        self._direct = self._launcher is not None and self._launcher.pid == os.getppid()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch. Does nothing without a launcher."""
        if self._launcher is None:
            return
        if self._direct and DEATH_SIGNAL is not None:
            _set_death_signal(DEATH_SIGNAL)
        self._thread = threading.Thread(target=self._poll, name="launcher watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch. Idempotent."""
        self._ended.set()
        if self._direct and DEATH_SIGNAL is not None:
            _set_death_signal(0)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(POLL_SECONDS)

    def look(self) -> None:
        """Call `lost` if the launcher has ended. The death signal also follows the end of the thread that started
        this process, while the launcher itself lives on."""
        if self._launcher is not None and not self._ended.is_set() and not self._is_alive():
            self._ended.set()
            self._lost(self._launcher.pid)

    def _is_alive(self) -> bool:
        assert self._launcher is not None
        if self._direct:
            return os.getppid() == self._launcher.pid
        try:
            return self._launcher.is_running() and self._launcher.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def _poll(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self.look()


def _set_death_signal(number: int) -> None:
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0)
