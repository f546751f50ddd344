"""The run directory: its name, and the names of the files of rows in it."""

import re
from datetime import datetime
from pathlib import Path

from grpo.config.schema import Config
from grpo.errors import ConfigError

METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"
EVALUATIONS, FINDINGS = "evaluations.jsonl", "findings.jsonl"


def choose_run_dir(config: Config, now: datetime) -> Path:
    """Return the run directory: run_dir, or outputs/<run_name>, or outputs/<model>-<data>-<time>.

    Raises:
        ConfigError: for a folder that holds another run, unless that run is to be resumed.
    """
    if config.run_dir is not None:
        run_dir = Path(config.run_dir)
    else:
        model, data = Path(config.model.name).name, Path(config.data.name).name
        name = config.tracking.run_name or f"{model}-{data}-{now:%Y%m%d-%H%M%S}"
        run_dir = Path("outputs") / (_slug(name) or "run")
    if config.resume is None and (run_dir / METRICS).exists():
        raise ConfigError(
            f"run_dir {run_dir} already holds a run ({METRICS}). Continue it with --resume auto, or choose another "
            f"folder with --run_dir"
        )
    return run_dir


def _slug(name: str) -> str:
    """Return a name as one folder name: "Qwen/Qwen3 0.6B" -> "Qwen-Qwen3-0.6B"."""
    return re.sub(r"[^\w.-]+", "-", name)[:100].strip("-.")  # file systems take 255 bytes, a letter may need four
