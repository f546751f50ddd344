"""Background writer: makes the calls to a tracker in order, in its own thread, so that training does not wait.

submit(start) -> submit(log) -> submit(log) -> ... -> close(finish) -> wait(5.0)      all return at once except wait
                     |
                     `- raises, or takes longer than CALL_SECONDS: the tracker is switched off, with one warning
"""

import threading
import time
from collections import deque
from collections.abc import Callable

from grpo.runtime.exit import prevents_exit

CALL_SECONDS = 60.0
"""A call that takes longer counts as a failure. Connecting to W&B takes a few seconds."""

THREAD = "background writer"
"""Prefix of the names of its threads."""

OnFailure = Callable[[str, BaseException | None], None]
"""Called once, with the call that failed ("start", "log", "finish") and the error (None: it took too long)."""


class BackgroundWriter:
    """Makes the calls of one tracker. After a failure it makes no more of them.

    Args:
        name: the tracker's name.
        failed: called once, at the first failure.
    """

    def __init__(self, name: str, failed: OnFailure):
        self.is_alive = True
        self._failed = failed
        self._calls: deque[tuple[str, Callable[[], object]]] = deque()
        self._running: tuple[str, float] | None = None
        """The call under way and when it began."""
        self._is_closing = False
        self._changed = threading.Condition()
        # A daemon thread, so that a call that never returns does not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name=f"{THREAD} {name}", daemon=True)
        self._thread.start()

    def submit(self, doing: str, call: Callable[[], object]) -> None:
        """Queue a call. Returns at once."""
        with self._changed:
            if self.is_alive:
                self._calls.append((doing, call))
                self._changed.notify_all()
        running = self._running
        if running is not None and time.monotonic() - running[1] > CALL_SECONDS:
            self._give_up(running[0], None)

    def close(self, finish: Callable[[], object]) -> None:
        """Queue the last call. Returns at once."""
        with self._changed:
            self._calls.append(("finish", finish))
            self._is_closing = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait until the last call is done. A call that takes longer than `seconds` from now on counts as a failure."""
        began = time.monotonic()
        while self.is_alive and self._thread.is_alive():
            self._thread.join(0.05)
            running = self._running
            if running is not None and time.monotonic() - max(began, running[1]) > seconds:
                self._give_up(running[0], None)

    def _give_up(self, doing: str, error: BaseException | None) -> None:
        with self._changed:
            if not self.is_alive:
                return
            self.is_alive = False
            self._calls.clear()
        self._failed(doing, error)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._calls or self._is_closing or not self.is_alive)
                if not self._calls:
                    return
                doing, call = self._calls.popleft()
                self._running = doing, time.monotonic()
            try:
                if self.is_alive:
                    call()
            except BaseException as error:  # a failing tracker must not stop training
                self._give_up(doing, error)


@prevents_exit
def has_hung_call() -> bool:
    """Return True if a call has not returned. Exit handlers of its library may wait for it, too."""
    return any(thread.name.startswith(THREAD) for thread in threading.enumerate())
