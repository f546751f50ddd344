"""Files of JSON rows with a "step": conversion of values to JSON, removal of rows that a resumed run writes again."""

import json
import math
import os
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """Return a value that JSON can hold: tensors and arrays as numbers, NaN and infinity (no JSON) as None."""
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
    """Remove the rows of `step` and later ones, and a line cut off by a crash."""
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    with path.open(encoding="utf-8", errors="replace") as source, temporary.open("w", encoding="utf-8") as kept:
        for line in source:
            if _step_of(line) < step:
                kept.write(line)
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(temporary, path)


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
