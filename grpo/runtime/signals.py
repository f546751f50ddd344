"""Signals: a request to stop -> finish and save the step, then stop. A second Ctrl-C or SIGTERM exits immediately.

SIGINT                              Ctrl-C, the stop button of a notebook
SIGTERM SIGUSR1 SIGUSR2 SIGXCPU     schedulers, `kill`, `timeout`, container runtimes
SIGHUP                              a closed terminal or SSH session, unless it was ignored at the start (nohup)
end of the launcher                 as SIGTERM: `accelerate launch` was killed, or does not pass the signal on
"""

import builtins
import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from grpo.errors import Interrupted
from grpo.runtime.exit import force_exit, runs_command
from grpo.runtime.launcher import DEATH_SIGNAL, LauncherWatch, launcher_is_gone

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP")
CAUGHT = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
ECHO_SECONDS = 1.0
"""A launcher forwards a signal to processes that have received it already: one that follows this soon is the same."""


class Signals:
    """Signal handlers of a run (`with Signals() as signals`). `received` is the first signal's number, 0 before."""

    def __init__(self) -> None:
        self.received = 0
        self.training = False
        """True once there is something to save. Before, a signal stops the run at once."""
        self._when = 0.0
        self._before: dict[int, Any] = {}
        self._launcher = LauncherWatch(self._launcher_lost)

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # Python allows no handlers in other threads
            for number in CAUGHT:
                if not _stays_ignored(number):
                    self._before[number] = signal.signal(number, self._handle)
            if DEATH_SIGNAL is not None:
                self._before[DEATH_SIGNAL] = signal.signal(DEATH_SIGNAL, lambda number, frame: self._launcher.look())
            if launcher_is_gone():
                self.__exit__()
                raise Interrupted(signal.SIGTERM, "the launcher has ended before the first step: nothing to save")
            self._launcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._launcher.stop()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and now - self._when < ECHO_SECONDS:
            return
        if self.received:
            # A scheduler announces one end by several signals: only a repeated request cuts the save short.
            if number == signal.SIGINT or number == self.received == signal.SIGTERM:
                self._stop_now(number)
            return
        self.received, self._when = number, now
        name = signal.Signals(number).name
        if not self.training:
            raise Interrupted(number, f"stopped by {name} before the first step: nothing to save")
        again = "press Ctrl-C again to exit immediately" if exits_on_signal() else "interrupt again to stop at once"
        _tell(f"{name}: saving after this step; {again}\n")

    def _stop_now(self, number: int) -> None:
        if number == signal.SIGINT and not exits_on_signal():
            raise KeyboardInterrupt  # ends the cell, or the caller's own program in its own way
        force_exit(Interrupted(number, "").exit_code)

    def _launcher_lost(self, pid: int) -> None:
        """React to the end of the launcher: as to SIGTERM, but never as to a second signal."""
        if not self.received:
            _tell(f"the launcher (process {pid}) has ended: stopping this process, too\n")
            os.kill(os.getpid(), signal.SIGTERM)


def exits_on_signal() -> bool:
    """Return whether a signal may end this process: it runs a command, and no notebook or Python prompt."""
    return runs_command() and not hasattr(sys, "ps1") and not hasattr(builtins, "get_ipython")


def _stays_ignored(number: int) -> bool:
    """Return whether the signal was ignored at the start by the user's choice. torchrun handles SIGHUP even then, and
    kills its workers 30 s later, so that they have to save."""
    if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN:
        return False
    by_torchrun = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT").split(",")
    return not ("TORCHELASTIC_RUN_ID" in os.environ and signal.Signals(number).name in by_torchrun)


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode())  # not print, which a handler may interrupt
