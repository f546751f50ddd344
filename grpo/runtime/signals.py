"""Signals: Ctrl-C, SIGTERM or SIGUSR1 -> the step is finished and saved, then the run ends; a second one ends it at once."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from grpo.errors import Interrupted
from grpo.runtime.exit import force_exit

CAUGHT = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
ECHO_SECONDS = 1.0
"""A launcher passes a signal on to processes that have received it already: what comes this soon is the same one."""


class Signals:
    """Installed while a run lasts (`with Signals() as signals`). `received` is the first signal's number, 0 before."""

    def __init__(self) -> None:
        self.received = 0
        self.training = False
        """Whether there is something to save. Before that, a signal ends the run as soon as it comes."""
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._handle) for number in CAUGHT}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and now - self._when < ECHO_SECONDS:
            return
        if self.received:
            force_exit(Interrupted(number, "").exit_code)
        self.received, self._when = number, now
        if not self.training:
            raise Interrupted(
                number, f"stopped by {signal.Signals(number).name} before the first step: nothing to save"
            )
        _tell(f"{signal.Signals(number).name}: saving after this step; once more ends it at once\n")


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode())  # not print: a handler may interrupt a print
