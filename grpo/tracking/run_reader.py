"""Readers: a run directory -> numbers and completions, while the run goes on and afterwards. Reads files, nothing else.

metrics.jsonl    MetricsFile: every column, read once; a refresh reads only what was added since
rollouts.jsonl   rows_of_step: the completions of one step, found by bisection; steps only ever grow in the file
                 search: those of many steps that fit, the newest first, for as long as somebody waits
findings.jsonl   why the run does not learn, in its own words
"""

import json
import math
import os
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from numpy.typing import ArrayLike

Row = dict[str, Any]
Fits = Callable[[list[Row]], list[Row]]
"""Rows -> those of them that are looked for."""

SEARCH_SECONDS = 2.0
"""A search that takes longer shows what it has found until then."""
_BLOCK = 1 << 20

CORRECT = ("accuracy", "exact_match", "correctness")
"""Rewards that say whether an answer is right, the first that a run has."""


class MetricsFile:
    """metrics.jsonl as columns: `steps`, and for each key a value per step, NaN where the step has none.
    `changes` counts the refreshes that found something new."""

    def __init__(self, path: Path):
        self.path = path
        self._clear()

    def _clear(self) -> None:
        self.steps: array[int] = array("q")
        self.changes = getattr(self, "changes", 0) + 1
        self.columns: dict[str, array[float]] = {}
        self._offset, self._identity = 0, (0, 0)

    def refresh(self) -> bool:
        """Read what was added. -> whether anything changed. A file that a resume has rewritten is read anew."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                anew = identity != self._identity or status.st_size < self._offset
                if anew:
                    self._clear()
                    self._identity = identity
                file.seek(self._offset)
                added = file.read()
        except OSError:
            return False
        whole = added.rfind(b"\n") + 1  # a line that is still being written waits for the next refresh
        loads = _quick_loads()
        for line in added[:whole].split(b"\n"):
            try:
                row = loads(line)
            except ValueError:
                continue
            self._add(row)
        self._offset += whole
        self.changes += whole > 0
        return anew or whole > 0

    def _add(self, row: Any) -> None:
        try:
            self.steps.append(int(row.pop("step")))
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # damaged: the steps around it are still worth showing
        before = len(self.steps) - 1
        for key, value in row.items():
            if type(value) is not float and type(value) is not int:
                continue
            column = self.columns.get(key)
            if column is None:
                column = self.columns[key] = array("d")
            if len(column) != before:
                column.extend([math.nan] * (before - len(column)))
            column.append(value)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The steps that have `key`, and its values there."""
        steps, values = self.arrays(key)
        return steps.tolist(), values.tolist()

    def arrays(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """`series` as arrays: quick for 85,000 steps."""
        values = np.array(self.columns.get(key, array("d")))  # a copy: a view would stop the column from growing
        there = np.flatnonzero(np.isfinite(values))
        return np.array(self.steps[: len(values)])[there], values[there]

    def last(self, key: str) -> float | None:
        values = self.series(key)[1]
        return values[-1] if values else None


def _quick_loads() -> Callable[[bytes], Any]:
    """orjson, which comes with gradio, reads three times as fast."""
    try:
        from orjson import loads
    except ImportError:
        return json.loads
    return loads


@dataclass
class RunFolder:
    """One run directory."""

    path: Path
    metrics: MetricsFile = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = MetricsFile(self.path / "metrics.jsonl")

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return (self.path / "final").is_dir()

    def config(self) -> dict[str, Any]:
        """config.yaml as plain values; {} where it is missing or damaged."""
        try:
            loaded = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def environment(self) -> dict[str, Any]:
        try:
            loaded = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def base_model(self) -> str | None:
        """What the run started from: a folder or a hub id."""
        derived = self.environment().get("derived")
        base = derived.get("base_model") if isinstance(derived, dict) else None
        return base if isinstance(base, str) else None

    @property
    def seconds_quiet(self) -> float:
        """Since metrics.jsonl was last written."""
        try:
            return time.time() - (self.path / "metrics.jsonl").stat().st_mtime
        except OSError:
            return math.inf

    def last_rollout_step(self) -> int | None:
        return last_step(self.path / "rollouts.jsonl")

    def rows_of_step(self, step: int) -> list[Row]:
        return rows_of_step(self.path / "rollouts.jsonl", step)

    def search(self, newest: int, oldest: int, fits: Fits, most: int) -> tuple[list[Row], int]:
        return search(self.path / "rollouts.jsonl", newest, oldest, fits, most)

    def findings(self) -> list[Row]:
        """findings.jsonl: "step", "name", "text", "mend" of each; what is half written or damaged is left out."""
        try:
            lines = (self.path / "findings.jsonl").read_bytes().splitlines()
        except OSError:
            return []
        return [row for row in _parsed(lines) if {"step", "text", "mend"} <= row.keys()]


def find_runs(root: Path) -> list[RunFolder]:
    """`root` itself if it is a run, and the runs in its folders; the newest first. Links are not followed."""
    folders = [root, *(child for child in _children(root) if child.is_dir() and not child.is_symlink())]
    runs = [folder for folder in folders if (folder / "metrics.jsonl").is_file()]
    return [RunFolder(run) for run in sorted(runs, key=lambda run: -(run / "metrics.jsonl").stat().st_mtime)]


def _children(root: Path) -> list[Path]:
    try:
        return sorted(root.iterdir())
    except OSError:
        return []


def rows_of_step(path: Path, step: int) -> list[Row]:
    """The rows of rollouts.jsonl for one step. About 30 short reads, however long the file is."""
    try:
        with path.open("rb") as file:
            file.seek(_first_at_least(file, step))
            return list(_rows_while(file, step))
    except OSError:
        return []


def search(
    path: Path, newest: int, oldest: int, fits: Fits, most: int, seconds: float = SEARCH_SECONDS
) -> tuple[list[Row], int]:
    """Rows of the steps `newest` down to `oldest` that fit, the newest step first, at most `most`; and the oldest step that was
    looked at: enough rows, or `seconds`, end the search. The file is read from its end, so that new rows come soon."""
    found: list[Row] = []
    reached, until = newest, time.monotonic() + seconds
    try:
        with path.open("rb") as file:
            start, end = _first_at_least(file, oldest), _first_at_least(file, newest + 1)
            for lines in _blocks_back(file, start, end):
                rows = _parsed(lines)
                if rows:
                    reached = int(rows[0].get("step", reached))
                    found = fits(rows) + found
                if len(found) >= most or time.monotonic() > until:
                    break
            else:
                reached = oldest
    except OSError:
        return [], newest
    found.sort(key=lambda row: -int(row.get("step", 0)))
    return found[:most], reached


def _blocks_back(file: BinaryIO, start: int, end: int) -> Iterator[list[bytes]]:
    """The whole lines between two offsets, in blocks from the last to the first."""
    span = _BLOCK
    while end > start:
        begin = max(start, end - span)
        file.seek(begin)
        data = file.read(end - begin)
        skipped = 0 if begin == start else data.find(b"\n") + 1
        if begin > start and skipped in (0, len(data)):  # no whole line: it is longer than the block
            span *= 2
            continue
        yield data[skipped:].split(b"\n")
        end = begin + skipped


def _parsed(lines: list[bytes]) -> list[Row]:
    """The lines that hold an object."""
    loads, rows = _quick_loads(), []
    for line in lines:
        try:
            row = loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def last_step(path: Path) -> int | None:
    """The newest step of rollouts.jsonl that has a whole line."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            span = 1 << 16
            while True:
                file.seek(max(0, size - span))
                lines = file.read(span).split(b"\n")[:-1]
                for line in reversed(lines):
                    step = _step_of(line)
                    if step is not None:
                        return step
                if span >= size:
                    return None
                span *= 8
    except OSError:
        return None


def _first_at_least(file: BinaryIO, step: int) -> int:
    """The offset of the first line of `step` or a later one; the end of the file where there is none."""
    low, high = 0, (size := file.seek(0, os.SEEK_END))
    while low < high:
        middle = (low + high) // 2
        found = _line_after(file, middle)
        if found is None or found[1] >= step:
            high = middle
        else:
            low = max(middle + 1, found[0] + 1)
    found = _line_after(file, low)
    return found[0] if found is not None else size


def _line_after(file: BinaryIO, offset: int) -> tuple[int, int] | None:
    """(offset, step) of the first readable line that starts at `offset` or after it."""
    file.seek(max(0, offset - 1))
    if offset:
        file.readline()  # to the next line's start; none is skipped if `offset` is one
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            return None
        step = _step_of(line)
        if step is not None:
            return start, step


def _step_of(line: bytes) -> int | None:
    head = line[:40].partition(b",")[0]
    if head.startswith(b'{"step": '):
        try:
            return int(head.removeprefix(b'{"step": '))
        except ValueError:
            pass
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _rows_while(file: BinaryIO, step: int) -> Iterator[Row]:
    for line in file:
        found = _step_of(line)
        if found is None or not line.endswith(b"\n"):
            continue
        if found != step:
            return
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def is_correct(row: Row) -> bool | None:
    """Whether the completion's answer is right, by the first reward in CORRECT; None if the run has none of them."""
    rewards = row.get("rewards")
    if not isinstance(rewards, dict):
        return None
    for name in CORRECT:
        value = rewards.get(name)
        if value is not None:
            return float(value) > 0
    return None


def matching(
    rows: list[Row],
    *,
    text: str = "",
    correct: bool | None = None,
    lowest: float | None = None,
    highest: float | None = None,
) -> list[Row]:
    """The rows whose prompt or completion holds `text` (case ignored), and so on; None = no condition."""
    wanted = text.casefold()
    return [
        row
        for row in rows
        if wanted in f"{row.get('prompt', '')}\n{row.get('completion', '')}".casefold()
        and (correct is None or is_correct(row) is correct)
        and (lowest is None or _reward(row) >= lowest)
        and (highest is None or _reward(row) <= highest)
    ]


def groups_of(rows: list[Row]) -> dict[int, list[Row]]:
    """Rows by prompt (its draw), in the order in which they come."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(int(row.get("draw", 0)), []).append(row)
    return groups


def thin(steps: ArrayLike, values: ArrayLike, points: int = 1000) -> tuple[list[float], list[float]]:
    """At most `points` means over neighbouring steps, so that a curve of 85,000 can be drawn.

    # steps 1 2 3 4, values 0 1 4 5, points 2  ->  steps 1.5 3.5, values 0.5 4.5
    """
    at, value = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(at) > points:
        starts = _starts(len(at), points)
        counts = np.diff(np.append(starts, len(at)))
        at, value = np.add.reduceat(at, starts) / counts, np.add.reduceat(value, starts) / counts
    return at.tolist(), value.tolist()


def extremes(values: np.ndarray, points: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest of the neighbours that `thin` takes the mean of.

    # values 0 1 4 5, points 2  ->  0 4, 1 5
    """
    if len(values) <= points:
        return values, values
    starts = _starts(len(values), points)
    return np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def _starts(count: int, points: int) -> np.ndarray:
    return np.arange(0, count, math.ceil(count / points))


def _reward(row: Row) -> float:
    reward = row.get("reward")
    return float(reward) if isinstance(reward, (int, float)) else -math.inf
