"""Tracking: each step's numbers and completions -> the run directory always; W&B, TensorBoard, trackio when asked.

    run_dir/config.yaml         the resolved config; `--config run_dir/config.yaml` gives it again
    run_dir/environment.json    versions, machine, git commit, command line; never an environment variable
    run_dir/metrics.jsonl       {"step": 7, "reward/mean": 0.4, ...}, a line per step
    run_dir/rollouts.jsonl      {"step": 7, "prompt": ..., "completion": ..., ...}, a line per completion
    run_dir/evaluations.jsonl   {"step": 0, "question": ..., "completion": ..., "accuracy": 1.0, ...}, a line per held-out item
    run_dir/findings.jsonl      {"step": 20, "name": "dead:soft_format", "text": ..., "mend": ...}, why it does not learn

The files are the interface: reports and dashboards read them. An outside tracker that fails is switched off, and
training goes on. Only the main process makes a Tracker.
"""

import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from grpo.config.schema import Config, flatten, to_dict
from grpo.errors import ConfigError, StorageError
from grpo.runtime.device import device_names
from grpo.runtime.jsonl import LineWriter
from grpo.runtime.redaction import redacted
from grpo.tracking.backends import REMOTE, Outside, completions_table, start_tracker
from grpo.tracking.background_writer import CALL_SECONDS, BackgroundWriter
from grpo.tracking.diagnostics import Finding

_log = logging.getLogger(__name__)
_METRICS, _ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"
_EVALUATIONS, _FINDINGS = "evaluations.jsonl", "findings.jsonl"


def choose_run_dir(config: Config, now: datetime) -> Path:
    """Where this run is written: run_dir, or outputs/<run_name>, or outputs/<model>-<data>-<time>.

    Raises ConfigError for a folder that holds another run, unless that run is to be continued.
    """
    if config.run_dir is not None:
        run_dir = Path(config.run_dir)
    else:
        model, data = Path(config.model.name).name, Path(config.data.name).name
        name = config.tracking.run_name or f"{model}-{data}-{now:%Y%m%d-%H%M%S}"
        run_dir = Path("outputs") / (_slug(name) or "run")
    if config.resume is None and (run_dir / _METRICS).exists():
        raise ConfigError(
            f"run_dir {run_dir} already holds a run ({_METRICS}). Continue it with --resume auto, or choose another "
            f"folder with --run_dir"
        )
    return run_dir


def check_trackers(report_to: list[str]) -> None:
    """Raise ConfigError for a tracker whose library is not installed."""
    for library in report_to:
        try:  # not find_spec: the folder wandb/ that W&B leaves behind would pass for the library
            importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError as error:
            raise ConfigError(
                f"tracking.report_to has '{library}', which is not installed: pip install {library}, or leave it out"
            ) from error


class Tracker:
    """Writes one run. `resume_step` is the step that comes next: rows of it and later ones, from before, are dropped.

    `derived` holds what follows from the config and the data together (batch_size, num_train_epochs, ...), for W&B.
    """

    def __init__(self, run_dir: Path, config: Config, derived: dict[str, Any], resume_step: int) -> None:
        self.run_dir = run_dir
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            last_step = _last_step(run_dir / _METRICS)
            for name in (_METRICS, _ROLLOUTS, _EVALUATIONS, _FINDINGS):
                _drop_rows_from(run_dir / name, resume_step)
            _write_whole(run_dir / "config.yaml", yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False))
            _write_whole(
                run_dir / "environment.json", json.dumps(_plain(_environment() | {"derived": derived}), indent=2) + "\n"
            )
            self._files = {name: LineWriter(run_dir / name) for name in (_METRICS, _ROLLOUTS, _EVALUATIONS, _FINDINGS)}
        except OSError as error:
            raise StorageError(f"cannot write the run directory {run_dir}: {error}. Set another --run_dir") from error
        name = config.tracking.run_name or run_dir.name
        settings = {**flatten(to_dict(config)), **dataclasses.asdict(config.optimizer), "run_name": name, **derived}
        self._patience, self._ending = config.tracking.finish_timeout, False
        self._outside: dict[str, Outside] = {}
        self._couriers = {
            library: BackgroundWriter(library, partial(self._failed, library)) for library in config.tracking.report_to
        }
        for library, courier in self._couriers.items():
            start = partial(start_tracker, library, run_dir, config.tracking.project, settings, resume_step, last_step)
            courier.post("start", partial(self._start, library, start))

    def log(
        self, step: int, metrics: dict[str, Any], rows: Sequence[dict[str, Any]] = (), *, table: bool = False
    ) -> None:
        """One step: its metrics, and its completions, each a row with its "step". `table`: completions for the outside
        trackers, too. Call it once per step."""
        self._write(_ROLLOUTS, rows)
        self._write(_METRICS, [{"step": step, **metrics}])
        numbers = {key: float(value) for key, value in metrics.items() if value is not None}
        completions = completions_table(_plain(list(rows))) if table and rows else None
        for library, courier in self._couriers.items():  # by name: the start of one may still be under way
            courier.post("log", partial(self._log_outside, library, step, numbers, completions))

    def log_evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        """One held-out evaluation, item by item: what a paired test of the run needs."""
        self._write(_EVALUATIONS, [{"step": step, **row} for row in rows])

    def log_finding(self, step: int, finding: Finding) -> None:
        """Why the run does not learn. Said once: `findings_made` holds the names of those that stand there already."""
        self._write(_FINDINGS, [{"step": step, **dataclasses.asdict(finding)}])

    def findings_made(self) -> set[str]:
        text = (self.run_dir / _FINDINGS).read_text(encoding="utf-8")
        return {json.loads(line)["name"] for line in text.splitlines()}

    def let_go(self) -> None:
        """No step follows: the outside trackers may upload what is left, while the run does what it still has to."""
        if self._ending:
            return
        self._ending = True
        for file in self._files.values():
            file.add([])  # what a full disk held up, so that the report has it
        for library, courier in self._couriers.items():
            courier.close(lambda library=library: self._outside[library].finish())  # type: ignore[misc]

    def finish(self) -> None:
        """Close everything. Raises StorageError if a row could not be written until now. A second call does nothing."""
        self.let_go()
        couriers, self._couriers = self._couriers, {}
        for library, courier in couriers.items():
            courier.wait(self._patience if library in REMOTE else CALL_SECONDS)
        for file in self._files.values():
            file.close()

    def _start(self, library: str, start: Callable[[], Outside]) -> None:
        self._outside[library] = start()

    def _log_outside(self, library: str, step: int, numbers: dict[str, float], completions: Any) -> None:
        self._outside[library].log(step, numbers, completions)

    def _failed(self, library: str, doing: str, error: BaseException | None) -> None:
        what = "did not answer in time" if error is None else redacted(f"{type(error).__name__}: {error}")
        if doing == "finish" and error is None:
            what += f" (tracking.finish_timeout {self._patience:g} s)"
        later = ""
        if library == "wandb" and doing != "start":
            later = f"; to upload it later: wandb sync {self.run_dir}/wandb/*run-*"
        _log.warning(
            "%s failed at %s and is switched off: %s. Training goes on; everything is in %s%s",
            *(library, doing, what, self.run_dir / _METRICS, later),
        )

    def _write(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        self._files[name].add([json.dumps(_plain(row), allow_nan=False, default=str) for row in rows])


class _Dumper(yaml.SafeDumper):
    """Quotes every text that starts like a number: the config reader takes 5e-6 as a number, plain YAML does not."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if text[:1] in set("-+0123456789") else None
    )


_Dumper.add_representer(str, _represent_text)


def _slug(name: str) -> str:
    """A name as one folder name: "Qwen/Qwen3 0.6B" -> "Qwen-Qwen3-0.6B"."""
    return re.sub(r"[^\w.-]+", "-", name)[:100].strip("-.")  # file systems take 255 bytes, a letter may need four


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: tensors and arrays as numbers, NaN and infinity (no JSON) as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _drop_rows_from(path: Path, step: int) -> None:
    """Keep the rows before `step`. A line cut off by a crash goes too."""
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


def _last_step(path: Path) -> int:
    """The last step of a file; -1 where there is none."""
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


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _environment() -> dict[str, Any]:
    """What someone needs who wants the same numbers again."""
    versions: dict[str, str | None] = {}
    for library in ("grpo-trainer", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "peft"):
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": device_names(),
        "git_commit": _git_commit(),
        "argv": [redacted(word) for word in sys.argv],
    }


def _git_commit() -> str | None:
    """The commit of the trainer's code, "-dirty" if files were changed since; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
