"""Files of JSON rows with a "step": conversion of values to JSON, removal of rows that a resumed run writes again."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.runtime.storage import remove, sync

MAX_NUMBERS = 1000
"""Numbers of an array that are written into a row."""


def columns_once(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of one step, the columns of a prompt only in the first row of its group."""
    seen: set[Any] = set()
    once = []
    for row in rows:
        draw = row.get("draw")
        once.append({key: value for key, value in row.items() if key != "columns"} if draw in seen else row)
        if draw is not None:
            seen.add(draw)
    return once


def plain(value: Any) -> Any:
    """Return a value that JSON can hold: tensors and arrays as numbers, NaN and infinity (no JSON) as None.

    Bytes, and arrays of more than MAX_NUMBERS (pictures, sound), are only described.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if math.prod(getattr(value, "shape", ())) > MAX_NUMBERS:
        return f"<{type(value).__name__} of shape {tuple(value.shape)}>"
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def drop_rows_from(path: Path, step: int) -> None:
    """Remove the rows of `step` and later ones, and a line cut off by a crash.

    Rows are written in the order of their steps, so that they are the end of the file, which is cut off in place: that
    takes no space.
    """
    if not path.exists():
        return
    position = end = 0
    with path.open("rb") as source:
        for line in source:
            position += len(line)
            if _step_of(line.decode("utf-8", "replace")) < step:
                if end < position - len(line):  # a row to keep after one to remove
                    _rewrite(path, step)
                    return
                end = position
    if end < position:
        with path.open("r+b") as file:
            file.truncate(end)
        sync(path)


def _rewrite(path: Path, step: int) -> None:
    """Write the rows before `step` to a new file in the place of the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with path.open(encoding="utf-8", errors="replace") as source, temporary.open("w", encoding="utf-8") as kept:
            for line in source:
                if _step_of(line) < step:
                    kept.write(line)
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        remove(temporary)
        raise


def set_aside(run_dir: Path, names: Sequence[str]) -> Path | None:
    """Move the files of an earlier start into records-N/. Return that folder; None if they hold no rows."""
    present = [name for name in names if (run_dir / name).is_file() and (run_dir / name).stat().st_size]
    if not present:
        return None
    number = 1
    while os.path.lexists(run_dir / f"records-{number}"):
        number += 1
    folder = run_dir / f"records-{number}"
    folder.mkdir()
    for name in present:
        os.replace(run_dir / name, folder / name)
    return folder


def last_step(path: Path) -> int:
    """Return the last step of a file; -1 if there is none."""
    if not path.exists():
        return -1
    with path.open(encoding="utf-8", errors="replace") as file:
        return int(max((step for step in map(_step_of, file) if step < math.inf), default=-1))


def _step_of(line: str) -> float:
    if not line.endswith("\n"):
        return math.inf
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old or the new text."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
