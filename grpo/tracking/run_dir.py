"""The run directory: its name, what it holds, and the names of the files of rows in it."""

import hashlib
import re
from datetime import datetime
from pathlib import Path

import yaml

from grpo.config.schema import Config
from grpo.errors import ConfigError, StorageError

METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"
EVALUATIONS, FINDINGS = "evaluations.jsonl", "findings.jsonl"
MAX_NAME = 100
"""Characters of a folder's name: file systems take 255 bytes, and a character may need four."""


def choose_run_dir(config: Config, now: datetime) -> Path:
    """Return the run directory: run_dir, or outputs/<run_name>, or outputs/<model>-<data>-<time>.

    Raises:
        ConfigError: for a folder that holds another run, unless that run is to be resumed.
        StorageError: for a folder that this user may not read.
    """
    if config.run_dir is not None:
        run_dir = Path(config.run_dir)
    elif config.tracking.run_name:
        run_dir = _named(config.tracking.run_name)
    else:
        model, data = Path(config.model.name).name, Path(config.data.name).name
        run_dir = Path("outputs") / (_slug(f"{model}-{data}-{now:%Y%m%d-%H%M%S}") or "run")
    if config.resume is None and holds_run(run_dir):
        raise ConfigError(
            f"run_dir {run_dir} already holds a run ({METRICS}). Continue it with --resume auto, or choose another "
            f"folder with --run_dir"
        )
    return run_dir


def has_chosen_name(config: Config) -> bool:
    """Return whether the user named the run directory. One that was named here may get another number instead."""
    return config.run_dir is not None or bool(config.tracking.run_name)


def holds_run(run_dir: Path) -> bool:
    """Return whether the folder holds the records of a run. Raises StorageError if this user may not look."""
    try:
        return (run_dir / METRICS).exists()
    except OSError as error:
        raise StorageError(
            f"cannot read the run directory {run_dir}: {error.strerror}. Set another --run_dir, or ask its owner"
        ) from error


def fingerprint(run_dir: Path) -> tuple[object, ...]:
    """Return what changes when a run writes into the folder: the size of its records and its checkpoints."""
    try:
        size = (run_dir / METRICS).stat().st_size
    except OSError:
        size = -1
    folder = run_dir / "checkpoints"
    try:
        return size, *sorted(path.name for path in folder.iterdir() if path.name.startswith("step-"))
    except OSError:
        return (size,)


def _named(run_name: str) -> Path:
    """Return the folder of a named run. A name that is cut keeps a hash of the whole, so that no two runs share one.

    Raises:
        ConfigError: the folder holds a run of another name.
    """
    whole = _slug(run_name, None) or "run"
    cut = _slug(run_name) or "run"
    earlier = Path("outputs") / cut
    if whole == cut or _recorded_name(earlier) == run_name:  # the folder of an older version
        folder = earlier
    else:
        folder = Path("outputs") / f"{cut[: MAX_NAME - 9]}-{hashlib.sha256(run_name.encode()).hexdigest()[:8]}"
    recorded = _recorded_name(folder)
    if recorded is not None and recorded != run_name and _slug(recorded, None) == whole:
        raise ConfigError(
            f"tracking.run_name '{run_name}' has the folder {folder}, which holds the run '{recorded}': choose another "
            "name, or set --run_dir"
        )
    return folder


def _recorded_name(run_dir: Path) -> str | None:
    """Return tracking.run_name of the run in a folder; None without one."""
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        return config["tracking"]["run_name"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _slug(name: str, length: int | None = MAX_NAME) -> str:
    """Return a name as one folder name: "Qwen/Qwen3 0.6B" -> "Qwen-Qwen3-0.6B"."""
    return re.sub(r"[^\w.-]+", "-", name)[:length].strip("-.")
