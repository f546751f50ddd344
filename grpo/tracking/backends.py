"""Trackers that belong to somebody else: each step's numbers, and now and then its completions -> W&B, TensorBoard, trackio.

grpo/tracking/run_logger.py calls them, and switches off the one that fails.
"""

import html
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from grpo.runtime.env import load_keys
from grpo.runtime.messages import visible
from grpo.tracking.report import fenced

_log = logging.getLogger(__name__)
_MOST_ROWS = 256
REMOTE = {"wandb"}
"""Those that wait for a network."""


@dataclass(frozen=True)
class Table:
    """Completions of one step: `columns` name the cells of each row."""

    columns: list[str]
    rows: list[list[Any]]


def completions_table(rollouts: list[dict[str, Any]]) -> Table:
    """Rows of rollouts.jsonl as a table, a column for each reward; at most 256 of them."""
    rewards = list(rollouts[0].get("rewards") or {}) if rollouts else []
    keys = ["step", "draw", "sample", "reward", "advantage", "length", "ended", "prompt", "completion"]
    rows = [
        [row.get(key) for key in keys] + [(row.get("rewards") or {}).get(name) for name in rewards]
        for row in rollouts[:_MOST_ROWS]
    ]
    return Table(keys + [f"reward/{name}" for name in rewards], rows)


class Outside(Protocol):
    """A tracker that belongs to somebody else."""

    def log(self, step: int, metrics: Mapping[str, float], table: Table | None) -> None: ...

    def finish(self) -> None: ...


def start_tracker(
    library: str, run_dir: Path, project: str, settings: dict[str, Any], resume_step: int, last_step: int
) -> Outside:
    """`resume_step`: the step that comes next, 0 for a new run; `last_step`: the last one that was logged before it."""
    if library == "wandb":
        return _Wandb(run_dir, project, settings, resuming=resume_step > 0)
    if library == "trackio":
        return _Trackio(project, settings, last_step if resume_step else -1)
    return _TensorBoard(run_dir, resume_step)


class _Wandb:
    """A resumed run goes on under its id, which is read from the folder that W&B left behind; what it has already, W&B
    leaves as it is."""

    def __init__(self, run_dir: Path, project: str, settings: dict[str, Any], resuming: bool) -> None:
        import wandb

        load_keys()
        mode: Any = os.environ.get("WANDB_MODE")
        if not mode:
            # Decided before init: without a key it would ask for one, or wait for a network that is not there.
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
            if mode == "offline":
                _log.warning(
                    "no WANDB_API_KEY (.env.example): W&B records offline. Later: wandb sync %s/wandb/*", run_dir
                )
        known = sorted((run_dir / "wandb").glob("*run-*-*"), key=lambda folder: folder.name.split("run-")[1])
        again: dict[str, Any] = {}
        if resuming and known:
            again = {"id": known[-1].name.rpartition("-")[2], "resume": "allow"}
        self._table = wandb.Table
        self._run = wandb.init(
            project=project, name=settings["run_name"], config=settings, dir=str(run_dir), mode=mode, **again
        )

    def log(self, step: int, metrics: Mapping[str, float], table: Table | None) -> None:
        logged: dict[str, Any] = dict(metrics)
        if table is not None:
            logged["completions"] = self._table(columns=[*table.columns], data=table.rows)
        self._run.log(logged, step=step)

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    """A local database in ~/.cache/huggingface/trackio (TRACKIO_DIR); `trackio show` opens it. It cannot take steps back:
    a resumed run leaves out those that it has."""

    def __init__(self, project: str, settings: dict[str, Any], last_step: int) -> None:
        import trackio

        self._trackio, self._last_step = trackio, last_step
        resume = "allow" if last_step >= 0 else "never"
        trackio.init(project=project, name=settings["run_name"], config=settings, resume=resume, embed=False)

    def log(self, step: int, metrics: Mapping[str, float], table: Table | None) -> None:
        if step <= self._last_step:
            return
        logged: dict[str, Any] = dict(metrics)
        if table is not None:
            # Its pages read cells as Markdown and HTML: a completion must be neither.
            rows = [
                [html.escape(visible(cell)) if isinstance(cell, str) else cell for cell in row] for row in table.rows
            ]
            logged["completions"] = self._trackio.Table(columns=table.columns, data=rows)
        self._trackio.log(logged, step=step)

    def finish(self) -> None:
        self._trackio.finish()


class _TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what was drawn after the checkpoint that the run resumes from.
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step or None, flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float], table: Table | None) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step, new_style=True, double_precision=True)
        if table is not None:
            self._writer.add_text("completions", _markdown(table), step)

    def finish(self) -> None:
        self._writer.close()


def _markdown(table: Table) -> str:
    """TensorBoard's texts are Markdown: numbers as a line, prompt and completion as blocks of code."""
    lines: list[str] = []
    for row in table.rows:
        cells = dict(zip(table.columns, row, strict=True))
        texts = f"{cells.pop('prompt')}\n---\n{cells.pop('completion')}"
        numbers = ", ".join(f"{key} {value}" for key, value in cells.items() if key != "step")
        lines += [f"`{visible(numbers).replace('`', ' ')}`", "", *fenced(texts), ""]
    return "\n".join(lines)
