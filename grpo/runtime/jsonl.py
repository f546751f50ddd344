"""Lines: rows -> a file that grows by whole lines, and that a full disk cannot stop."""

import os
from collections.abc import Callable
from pathlib import Path

from grpo.errors import StorageError

MAX_WAITING = 256 * 2**20
"""Bytes that may wait in memory for room on the disk."""


class Lines:
    """A file of lines, opened for appending. Where it cannot be written, lines wait in memory, and follow when it can.

    `warn` is told once, when the first line has to wait.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self.path = path
        self._warn = warn
        self._warned = False
        self._waiting = b""
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def add(self, lines: list[str]) -> None:
        """Each line without its end. On disk when this returns, or waiting. Raises StorageError once too much waits."""
        self._waiting += "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")
        error = self._flush()
        if error is None:
            return
        if len(self._waiting) > MAX_WAITING:
            raise StorageError(f"cannot write {self.path}: {error}. Free some space, then --resume auto")
        if not self._warned:
            self._warned = True
            self._warn(
                f"cannot write {self.path}: {error}. Training goes on; what is missing follows when there is room"
            )

    def close(self) -> None:
        """Raises StorageError if a line still waits. A second call does nothing."""
        if self._file is None:
            return
        error = self._flush()
        file, self._file = self._file, None
        os.close(file)
        if error is not None:
            raise StorageError(f"cannot write {self.path}: {error}. Its last rows are lost; the weights are not")

    def _flush(self) -> OSError | None:
        """Write what waits. A part that was written is not written again, so no line is ever torn or doubled."""
        assert self._file is not None
        try:
            while self._waiting:
                written = os.write(self._file, self._waiting)
                self._waiting = self._waiting[written:]
        except OSError as error:
            return error
        return None
