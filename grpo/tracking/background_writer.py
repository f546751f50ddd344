"""BackgroundWriter: calls to somebody else's tracker -> made one after another in a thread of their own, so that training never waits.

post(start) -> post(log) -> post(log) -> ... -> close(finish) -> wait(5.0)      return at once, but for wait
                   |
                   `- raises, or takes longer than CALL_SECONDS: switched off, with one warning
"""

import threading
import time
from collections import deque
from collections.abc import Callable

from grpo.runtime.exit import prevents_exit

CALL_SECONDS = 60.0
"""A call that takes longer is an outage: connecting to W&B takes a few seconds."""

THREAD = "courier"

Report = Callable[[str, BaseException | None], None]
"""Called once, with what it was doing and the error (None: it took too long)."""


class BackgroundWriter:
    """Makes calls for one tracker. After a failure it takes no more of them."""

    def __init__(self, name: str, failed: Report):
        self.alive = True
        self._failed = failed
        self._calls: deque[tuple[str, Callable[[], object]]] = deque()
        self._now: tuple[str, float] | None = None
        self._closing = False
        self._change = threading.Condition()
        # A daemon: a call that never returns must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name=f"{THREAD} {name}", daemon=True)
        self._thread.start()

    def post(self, doing: str, call: Callable[[], object]) -> None:
        """Have a call made, after those before. Returns at once."""
        with self._change:
            if self.alive:
                self._calls.append((doing, call))
                self._change.notify_all()
        now = self._now
        if now is not None and time.monotonic() - now[1] > CALL_SECONDS:
            self._give_up(now[0], None)

    def close(self, finish: Callable[[], object]) -> None:
        """Have the last call made, after those before. Returns at once."""
        with self._change:
            self._calls.append(("finish", finish))
            self._closing = True
            self._change.notify_all()

    def wait(self, seconds: float) -> None:
        """Until the last call was made, though not for ever: one that takes longer than `seconds` from now on is an outage."""
        began = time.monotonic()
        while self.alive and self._thread.is_alive():
            self._thread.join(0.05)
            now = self._now
            if now is not None and time.monotonic() - max(began, now[1]) > seconds:
                self._give_up(now[0], None)

    def _give_up(self, doing: str, error: BaseException | None) -> None:
        with self._change:
            if not self.alive:
                return
            self.alive = False
            self._calls.clear()
        self._failed(doing, error)

    def _work(self) -> None:
        while True:
            with self._change:
                self._now = None
                self._change.notify_all()
                self._change.wait_for(lambda: self._calls or self._closing or not self.alive)
                if not self._calls:
                    return
                doing, call = self._calls.popleft()
                self._now = doing, time.monotonic()
            try:
                if self.alive:
                    call()
            except BaseException as error:  # whatever a network or a foreign library does, training is worth more
                self._give_up(doing, error)


@prevents_exit
def has_hung_call() -> bool:
    """Whether some call never returned. What its library has registered for the end of the program may wait for it, too."""
    return any(thread.name.startswith(THREAD) for thread in threading.enumerate())
