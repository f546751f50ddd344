"""Records: each step's metrics and completions -> files, trackers, console, callbacks and diagnostics."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from grpo.config.schema import Config
from grpo.errors import StorageError
from grpo.packing import PackedBatch
from grpo.rewards.scoring import Scores
from grpo.run.callbacks import Callbacks, State
from grpo.runtime.distributed import gather_rows
from grpo.tracking.console import Display
from grpo.tracking.debug_dumps import dump_batches, dump_failures
from grpo.tracking.diagnostics import Diagnostics
from grpo.tracking.report import write_report
from grpo.tracking.run_logger import RunLogger
from grpo.types import Group

log = logging.getLogger(__name__)

TABLES, SAMPLES = 20, 3
"""Times in a run that completions are shown in the trackers, and in the console."""


class Recorder:
    """Records the steps of one run.

    Args:
        tracker: Writes the files; only on the main process.
        state: Returns the state that callbacks get, for a step and its rows.
        start: Steps done when the run was built.
        first_eval: Metrics of the first evaluation, from before a resume.
        last_eval: Metrics of the latest evaluation.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        run_dir: Path,
        tracker: RunLogger | None,
        console: Display,
        callbacks: Callbacks,
        diagnostics: Diagnostics,
        state: Callable[[int, list[dict[str, Any]]], State],
        *,
        start: int,
        first_eval: dict[str, float],
        last_eval: dict[str, float],
    ) -> None:
        self.config, self.accelerator, self.run_dir = config, accelerator, run_dir
        self.tracker, self.console, self.callbacks, self.diagnostics = tracker, console, callbacks, diagnostics
        self.state, self.start, self.steps_done = state, start, start
        self.first_eval, self.last_eval = first_eval, last_eval
        self.evaluated: list[dict[str, Any]] = []
        self.callbacks.begin(self.state(start, []))

    def record(self, step: int, metrics: dict[str, float], rows: list[dict[str, Any]] | None = None) -> None:
        """Record one step: its metrics, and every rank's rollouts. Collective."""
        evaluated = {key: value for key, value in metrics.items() if key.startswith("eval/")}
        if evaluated:
            self.first_eval = self.first_eval or evaluated
            self.last_eval = evaluated
        rows = gather_rows(self.accelerator, rows) if rows is not None else []
        rows.sort(key=lambda row: (row["draw"], row["sample"]))
        self.steps_done = step
        state = replace(self.state(step, rows), evaluated=self.evaluated if evaluated else [])
        metrics = self.callbacks.after_step(state, metrics, trained=step > self.start, evaluated=bool(evaluated))
        if self.tracker is None or not metrics:
            return
        shown = self.config.tracking.log_completions and bool(rows)
        self.tracker.log(step, metrics, rows, table=shown and self._is_due(step, TABLES))
        for finding in self.diagnostics.observe(step, metrics, rows):
            self.tracker.log_finding(step, finding)
            log.info("finding: %s", finding)
        self.console.step(step, metrics)
        if shown and self._is_due(step, SAMPLES):
            self.console.completions(rows)

    def step_begins(self, step: int) -> None:
        """Call the callbacks before a step. Collective where there are callbacks."""
        self.callbacks.before_step(self.state(step - 1, []))

    def saved(self, step: int) -> None:
        """Call the callbacks after a checkpoint of `step`. Collective where there are callbacks."""
        self.callbacks.saved(self.state(step, []))

    def _is_due(self, step: int, times: int) -> bool:
        """Return True after the first step, and about `times` times in a run."""
        return step == 1 or step % max(1, self.config.steps // times) == 0

    def log_evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Record every item of a held-out evaluation."""
        self.evaluated = rows
        if self.tracker is not None:
            self.tracker.log_evaluation(step, rows)

    def dump_failed_batches(self, step: int, groups: list[Group], scores: Scores, skipped: list[PackedBatch]) -> None:
        """Write the completions that rewards could not score, and the batches of a skipped step, to faults/."""
        rank = self.accelerator.process_index
        for line in dump_failures(self.run_dir, step, rank, groups, scores):
            log.info(line)
        if skipped:
            path = dump_batches(self.run_dir, step, rank, skipped)
            log.info("step %d was skipped: its loss or gradient is not finite. Its batches are in %s", step, path)

    def begin_shutdown(self) -> None:
        """Flush trackers after the last step."""
        if self.tracker is not None:
            self.tracker.begin_shutdown()

    def finish(self) -> None:
        """Show the table of before and after, write the report, and close the tracker."""
        if self.accelerator.is_main_process:
            self.console.table(self.first_eval, self.last_eval, self.run_dir)
        if self.tracker is not None:
            if self.config.tracking.report:
                self._report()
            self.tracker.finish()

    def _report(self) -> None:
        """Write report.md. The run is done and saved: a plot that fails must not make it a failure."""
        try:
            log.info("Report: %s", write_report(self.run_dir))
        except Exception as error:
            log.warning("no report: %r. Later: python launch/report.py --run %s", error, self.run_dir)

    def close(self) -> None:
        """Close callbacks, tracker and console. Idempotent."""
        self.callbacks.end(self.state(self.steps_done, []))
        if self.tracker is not None:
            with contextlib.suppress(StorageError):  # `finish` has raised it, or a worse error is on its way
                self.tracker.finish()
        self.console.close()  # a progress bar hides the cursor
