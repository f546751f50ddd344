"""Append-only files of lines (JSONL) that a full disk does not stop."""

import contextlib
import errno
import logging
import os
from pathlib import Path

from grpo.errors import StorageError

log = logging.getLogger(__name__)

MAX_BUFFERED = 256 * 2**20
"""Bytes that may be kept in memory until the disk has space."""


class LineWriter:
    """File that is extended by whole lines. Lines that cannot be written are kept in memory and written later.

    The first failure is reported with a warning.
    """

    def __init__(self, path: Path):
        self.path = path
        self._warned = False
        self._buffer = b""
        self._file: int | None = self._open()

    def add(self, lines: list[str]) -> None:
        """Append lines, given without their line ends.

        Raises:
            StorageError: More than MAX_BUFFERED bytes could not be written.
        """
        self._buffer += "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")
        error = self._flush()
        if error is None:
            return
        if len(self._buffer) > MAX_BUFFERED:
            raise StorageError(f"cannot write {self.path}: {error}. Free some space, then --resume auto")
        if not self._warned:
            self._warned = True
            log.warning(f"cannot write {self.path}: {error}. Training goes on; the rows follow once there is space")

    def close(self) -> None:
        """Write the buffer and close the file. Idempotent.

        Raises:
            StorageError: Some lines cannot be written.
        """
        if self._file is None:
            return
        error = self._flush()
        file, self._file = self._file, None
        os.close(file)
        if error is not None:
            raise StorageError(f"cannot write {self.path}: {error}. Its last rows are lost; the weights are not")

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)  # less the umask

    def _flush(self) -> OSError | None:
        """Write the buffer. A written part leaves the buffer at once, so no line is torn or doubled."""
        assert self._file is not None
        try:
            while self._buffer:
                written = os.write(self._file, self._buffer)
                self._buffer = self._buffer[written:]
        except OSError as error:
            if error.errno in (errno.ESTALE, errno.EIO, errno.EBADF):  # a file server that was restarted
                with contextlib.suppress(OSError):
                    reopened = self._open()
                    os.close(self._file)
                    self._file = reopened
            return error
        return None
