"""Signals: Ctrl-C, SIGTERM or SIGUSR1 -> finish and save the step, then stop; a second signal exits immediately."""

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
"""A launcher forwards a signal to processes that have received it already: one that follows this soon is the same."""


class Signals:
    """Signal handlers of a run (`with Signals() as signals`). `received` is the first signal's number, 0 before."""

    def __init__(self) -> None:
        self.received = 0
        self.training = False
        """True once there is something to save. Before, a signal stops the run at once."""
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # Python allows no handlers in other threads
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
        _tell(f"{signal.Signals(number).name}: saving after this step; press Ctrl-C again to exit immediately\n")


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode())  # not print, which a handler may interrupt
