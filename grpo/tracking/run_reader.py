"""Run reader: a run directory -> metrics, config and findings, during the run and afterwards. It only reads files.

metrics.jsonl    MetricsFile: all columns; a refresh reads only the rows that were added
rollouts.jsonl   see rollout_reader.py
findings.jsonl   findings of the diagnostics: reasons why the run does not learn
"""

import json
import math
import os
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike

from grpo.tracking.rollout_reader import (
    Condition,
    Row,
    fast_json_loads,
    last_step,
    parse_rows,
    rows_of_step,
    search,
)


class MetricsFile:
    """Columns of metrics.jsonl: `steps`, and for each key a value per step, NaN where the step has none.

    `changes` counts the refreshes that read new rows.
    """

    def __init__(self, path: Path):
        self.path = path
        self._clear()

    def _clear(self) -> None:
        self.steps: array[int] = array("q")
        self.changes = getattr(self, "changes", 0) + 1
        self.columns: dict[str, array[float]] = {}
        self._offset, self._identity = 0, (0, 0)

    def refresh(self) -> bool:
        """Read the rows that were added, or all rows if a resumed run has rewritten the file.

        Returns:
            True if anything changed.
        """
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
        whole = added.rfind(b"\n") + 1  # an incomplete last line is read by the next refresh
        loads = fast_json_loads()
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
            return  # a damaged line is skipped
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
        """Return the steps that have a finite value of `key`, and the values."""
        steps, values = self.arrays(key)
        return steps.tolist(), values.tolist()

    def arrays(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return `series` as arrays, which is fast for 85,000 steps."""
        values = np.array(self.columns.get(key, array("d")))  # a copy: a view would stop the column from growing
        there = np.flatnonzero(np.isfinite(values))
        return np.array(self.steps[: len(values)])[there], values[there]

    def last(self, key: str) -> float | None:
        """Return the newest value of `key`; None if there is none."""
        values = self.series(key)[1]
        return values[-1] if values else None


@dataclass
class RunFolder:
    """One run directory."""

    path: Path
    metrics: MetricsFile = field(init=False)
    color: int | None = None
    """Index of its color in plots of several runs; None: by its place among them."""

    def __post_init__(self) -> None:
        self.metrics = MetricsFile(self.path / "metrics.jsonl")

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return (self.path / "final").is_dir()

    def config(self) -> dict[str, Any]:
        """Return config.yaml as a dict; {} if it is missing or damaged."""
        try:
            loaded = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def environment(self) -> dict[str, Any]:
        """Return environment.json; {} if it is missing or damaged."""
        try:
            loaded = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def base_model(self) -> str | None:
        """Return the folder or hub id of the base model; None if it was not recorded."""
        derived = self.environment().get("derived")
        base = derived.get("base_model") if isinstance(derived, dict) else None
        return base if isinstance(base, str) else None

    @property
    def seconds_quiet(self) -> float:
        """Seconds since metrics.jsonl was last written."""
        try:
            return time.time() - (self.path / "metrics.jsonl").stat().st_mtime
        except OSError:
            return math.inf

    def last_rollout_step(self) -> int | None:
        return last_step(self.path / "rollouts.jsonl")

    def rows_of_step(self, step: int) -> list[Row]:
        return rows_of_step(self.path / "rollouts.jsonl", step)

    def search(self, newest: int, oldest: int, fits: Condition, most: int) -> tuple[list[Row], int]:
        return search(self.path / "rollouts.jsonl", newest, oldest, fits, most)

    def findings(self) -> list[Row]:
        """Return the rows of findings.jsonl ("step", "name", "text", "mend"), without incomplete or damaged ones."""
        try:
            lines = (self.path / "findings.jsonl").read_bytes().splitlines()
        except OSError:
            return []
        return [row for row in parse_rows(lines) if {"step", "text", "mend"} <= row.keys()]


def find_runs(root: Path) -> list[RunFolder]:
    """Return `root` if it is a run, and the runs in its folders, the newest first. Links are not followed."""
    folders = [root, *(child for child in _children(root) if child.is_dir() and not child.is_symlink())]
    runs = [folder for folder in folders if (folder / "metrics.jsonl").is_file()]
    return [RunFolder(run) for run in sorted(runs, key=lambda run: -(run / "metrics.jsonl").stat().st_mtime)]


def _children(root: Path) -> list[Path]:
    try:
        return sorted(root.iterdir())
    except OSError:
        return []


def thin(steps: ArrayLike, values: ArrayLike, points: int = 1000) -> tuple[list[float], list[float]]:
    """Reduce a curve to at most `points` means over neighbouring steps.

    # steps 1 2 3 4, values 0 1 4 5, points 2  ->  steps 1.5 3.5, values 0.5 4.5
    """
    at, value = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(at) > points:
        starts = _starts(len(at), points)
        counts = np.diff(np.append(starts, len(at)))
        at, value = np.add.reduceat(at, starts) / counts, np.add.reduceat(value, starts) / counts
    return at.tolist(), value.tolist()


def extremes(values: np.ndarray, points: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Return minimum and maximum of the neighbours that `thin` averages.

    # values 0 1 4 5, points 2  ->  0 4, 1 5
    """
    if len(values) <= points:
        return values, values
    starts = _starts(len(values), points)
    return np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def _starts(count: int, points: int) -> np.ndarray:
    return np.arange(0, count, math.ceil(count / points))
