"""Run logger: each step's metrics and completions -> the run directory, and the trackers of tracking.report_to.

    run_dir/config.yaml         the resolved config; `--config run_dir/config.yaml` gives it again
    run_dir/environment.json    versions, machine, git commit, command line; never an environment variable
    run_dir/metrics.jsonl       {"step": 7, "reward/mean": 0.4, ...}, a line per step
    run_dir/rollouts.jsonl      {"step": 7, "prompt": ..., "completion": ..., ...}, a line per completion
    run_dir/evaluations.jsonl   {"step": 0, "question": ..., "completion": ..., ...}, a line per held-out item
    run_dir/findings.jsonl      {"step": 20, "name": "dead:soft_format", "text": ..., "mend": ...}, a line per finding

Reports and dashboards read these files only. A tracker that fails is switched off, and training goes on.
Only the main process has a RunLogger.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from grpo.config.schema import Config, flatten, to_dict
from grpo.errors import StorageError
from grpo.runtime.jsonl import LineWriter
from grpo.runtime.redaction import redacted
from grpo.tracking.background_writer import CALL_SECONDS, BackgroundWriter
from grpo.tracking.environment import environment
from grpo.tracking.findings import Finding
from grpo.tracking.row_files import columns_once, drop_rows_from, last_step, plain, set_aside, write_whole
from grpo.tracking.run_dir import EVALUATIONS, FINDINGS, METRICS, ROLLOUTS
from grpo.tracking.tracker import TrackedRun, Tracker, completions_table, find_tracker

log = logging.getLogger(__name__)


class RunLogger:
    """Writes one run.

    Args:
        run_dir: the run directory, created if it does not exist.
        config: the resolved config.
        derived: values computed from config and data (batch_size, num_train_epochs, ...), for the trackers.
        resume_step: next step, 0 for a new run. Rows of it and of later steps are removed.

    Raises:
        StorageError: if the run directory cannot be written.
    """

    def __init__(self, run_dir: Path, config: Config, derived: dict[str, Any], resume_step: int) -> None:
        self.run_dir = run_dir
        names = (METRICS, ROLLOUTS, EVALUATIONS, FINDINGS)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            last = last_step(run_dir / METRICS)
            kept = set_aside(run_dir, names) if resume_step == 0 else None
            if kept is not None:
                log.info("the rows of an earlier start, which left no checkpoint, are kept in %s", kept)
            for name in names:
                drop_rows_from(run_dir / name, resume_step)
            write_whole(run_dir / "config.yaml", yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False))
            record = plain(environment() | {"derived": derived})
            write_whole(run_dir / "environment.json", json.dumps(record, indent=2) + "\n")
            self._files = {name: LineWriter(run_dir / name) for name in names}
        except OSError as error:
            raise StorageError(f"cannot write the run directory {run_dir}: {error}. Set another --run_dir") from error
        run_name = config.tracking.run_name or run_dir.name
        settings = {**flatten(to_dict(config)), **dataclasses.asdict(config.optimizer), "run_name": run_name, **derived}
        run = TrackedRun(run_dir, config.tracking.project, run_name, settings, resume_step, last)
        self._finish_timeout, self._is_ending = config.tracking.finish_timeout, False
        self._kinds = {name: find_tracker(name) for name in config.tracking.report_to}
        self._trackers: dict[str, Tracker] = {}
        self._writers = {name: BackgroundWriter(name, partial(self._failed, name)) for name in self._kinds}
        for name, writer in self._writers.items():
            writer.submit("start", partial(self._start, name, run))

    def log(
        self, step: int, metrics: dict[str, Any], rows: Sequence[dict[str, Any]] = (), *, table: bool = False
    ) -> None:
        """Log one step. Call it once per step.

        Args:
            step: steps that are done.
            metrics: numbers by key. Trackers do not get None values.
            rows: completions, each with its "step".
            table: log the completions to the trackers, too.
        """
        self._write(ROLLOUTS, columns_once(rows))
        self._write(METRICS, [{"step": step, **metrics}])
        numbers = {key: float(value) for key, value in metrics.items() if value is not None}
        completions = completions_table(plain(list(rows))) if table and rows else None
        for name, writer in self._writers.items():  # by name, because the tracker may still be starting
            writer.submit("log", partial(self._log_to, name, step, numbers, completions))

    def log_evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write one held-out evaluation, a row per item, for paired tests."""
        self._write(EVALUATIONS, [{"step": step, **row} for row in rows])

    def log_finding(self, step: int, finding: Finding) -> None:
        """Write a finding of the diagnostics."""
        self._write(FINDINGS, [{"step": step, **finding.to_row()}])

    def findings_made(self) -> set[str]:
        """Return the names of the findings in the file."""
        text = (self.run_dir / FINDINGS).read_text(encoding="utf-8")
        return {json.loads(line)["name"] for line in text.splitlines()}

    def begin_shutdown(self) -> None:
        """Flush trackers after the last step. They upload in the background. Idempotent."""
        if self._is_ending:
            return
        self._is_ending = True
        for file in self._files.values():
            file.add([])  # write rows that a full disk held back, so that the report has them
        for name, writer in self._writers.items():
            writer.close(partial(self._finish, name))

    def finish(self) -> None:
        """Close everything. Idempotent.

        Raises:
            StorageError: if a row still cannot be written.
        """
        self.begin_shutdown()
        writers, self._writers = self._writers, {}
        for name, writer in writers.items():
            writer.wait(self._finish_timeout if self._kinds[name].is_remote else CALL_SECONDS)
        for file in self._files.values():
            file.close()

    def _start(self, name: str, run: TrackedRun) -> None:
        self._trackers[name] = self._kinds[name](run)

    def _log_to(self, name: str, step: int, numbers: dict[str, float], completions: Any) -> None:
        self._trackers[name].log(step, numbers, completions)

    def _finish(self, name: str) -> None:
        self._trackers[name].finish()

    def _failed(self, name: str, doing: str, error: BaseException | None) -> None:
        reason = "did not answer in time" if error is None else redacted(f"{type(error).__name__}: {error}")
        if doing == "finish" and error is None:
            reason += f" (tracking.finish_timeout {self._finish_timeout:g} s)"
        hint = self._kinds[name].upload_hint(self.run_dir) if doing != "start" else ""
        log.warning(
            "%s failed at %s and is switched off: %s. Training goes on; everything is in %s%s",
            *(name, doing, reason, self.run_dir / METRICS, hint and f"; {hint}"),
        )

    def _write(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        self._files[name].add([json.dumps(plain(row), allow_nan=False, default=str) for row in rows])


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes texts which start like a number: 5e-6 is a number only for the config reader."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if text[:1] in set("-+0123456789") else None
    )


_Dumper.add_representer(str, _represent_text)
