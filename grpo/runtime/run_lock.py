"""Run lock: one process at a time writes a run directory. The system releases it when its holder dies."""

import json
import os
import socket
from pathlib import Path
from typing import TextIO

from grpo.errors import ConfigError

_NAME = ".lock"


class RunLock:
    """Lock that is held from construction until `release`.

    Raises:
        ConfigError: Another process holds it.
    """

    def __init__(self, run_dir: Path):
        self._file: TextIO | None = (run_dir / _NAME).open("a+", encoding="utf-8")
        if not _take(self._file):
            self._file.close()
            raise ConfigError(_in_use(run_dir))
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        self._file.flush()

    def release(self) -> None:
        """Release the lock. Idempotent."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def check_free(run_dir: Path) -> None:
    """Raise ConfigError if another process writes this run directory. Creates no file."""
    path = run_dir / _NAME
    if path.is_file():
        with path.open("a+", encoding="utf-8") as file:
            if not _take(file):
                raise ConfigError(_in_use(run_dir))


def _take(file: TextIO) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _in_use(run_dir: Path) -> str:
    try:
        holder = json.loads((run_dir / _NAME).read_text(encoding="utf-8"))
        who = f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return f"run_dir {run_dir} is in use by {who}: wait for it, stop it, or choose another --run_dir"
