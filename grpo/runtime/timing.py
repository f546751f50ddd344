"""Timing: seconds of each phase of a step."""

import torch

from grpo.runtime.device import TimeMark


class Clock:
    """Seconds of each phase of a step. On CUDA, those of the device, which lags behind the host.

    Args:
        device: The device that computes. None: the host alone.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device, self._last = device, TimeMark(device)
        self._laps: dict[str, float] = {}
        self._unread: list[tuple[str, TimeMark, TimeMark]] = []

    def lap(self, name: str) -> None:
        """Add the seconds since the last lap to the phase `name`."""
        now = TimeMark(self._device)
        self._unread.append((name, self._last, now))
        self._last = now

    @property
    def laps(self) -> dict[str, float]:
        """Seconds by phase. On CUDA, reading them waits for the device."""
        for name, start, end in self._unread:
            self._laps[name] = self._laps.get(name, 0.0) + end.seconds_since(start)
        self._unread.clear()
        return self._laps
