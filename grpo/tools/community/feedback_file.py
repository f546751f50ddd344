"""Feedback files: JSON lines that many processes append to safely, read strictly."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from grpo.errors import ConfigError, StorageError
from grpo.tools.community.feedback import Feedback, parse_feedback


def append_feedback(path: str | Path, *records: Feedback) -> None:
    """Append lines to a feedback file under an exclusive lock. They are on disk when this returns.

    If an earlier writer was killed within a line, that line is ended first, so that it cannot absorb the next one.

    Raises:
        StorageError: The file cannot be written.
    """
    data = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records).encode()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            with _locked(handle):
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    data = b"\n" + data
                while data:
                    data = data[os.write(handle, data) :]
                os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise StorageError(f"cannot write feedback to {path}: {error}") from error


def read_feedback(*paths: str | Path) -> tuple[list[Feedback], list[str]]:
    """Read feedback files. A line with the same id counts once.

    Returns:
        The records in order of their ids, and a reason for each line left out ("f.jsonl:8: cut off ..."). Only a torn
        line is left out: its writer was killed.

    Raises:
        ConfigError: A file is missing, or a complete line is wrong.
    """
    records: dict[str, Feedback] = {}
    left_out: list[str] = []
    for path in paths:
        if not Path(path).is_file():
            raise ConfigError(f"--feedback: there is no file {path}")
        for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                left_out.append(f"{place}: cut off or not JSON, left out ({type(error).__name__})")
                continue
            feedback = parse_feedback(record, place)
            if records.setdefault(feedback.feedback_id, feedback) != feedback:
                raise ConfigError(f"{place}: feedback_id {feedback.feedback_id} was used before, for something else")
    return [records[key] for key in sorted(records)], left_out


@contextlib.contextmanager
def _locked(handle: int) -> Iterator[None]:
    """Hold an exclusive lock on the open file. The system releases it when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows: users must write from one process at a time
        yield
        return
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)
