"""Trackers: metrics and completions of each step -> W&B, TensorBoard, trackio, or your own tracker.

    @register_tracker("mine")                   # or --tracking.report_to '[my_tracker.py:Mine]'
    class Mine(Tracker):
        def log(self, step, metrics, table): ...

The run logger (grpo/tracking/run_logger.py) calls each tracker in its own thread, and switches off one that fails.
"""

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from grpo.config.schema import Config
from grpo.errors import ConfigError
from grpo.registry import Registry

MAX_ROWS = 256
"""Completions in one table."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is started for."""

    run_dir: Path
    project: str
    name: str
    settings: dict[str, Any]
    """Every config key with its value, and values derived from them (batch_size, num_train_epochs, ...)."""
    resume_step: int = 0
    """Step that comes next; 0 for a new run."""
    last_step: int = -1
    """Last step that was logged before the run was interrupted; -1 for a new run."""


@dataclass(frozen=True)
class CompletionsTable:
    """Completions of one step: `columns` name the cells of each row."""

    columns: list[str]
    rows: list[list[Any]]


class Tracker(ABC):
    """A tracker outside the run directory. If a method raises, the tracker is switched off and training goes on."""

    library: ClassVar[str | None] = None
    """Name of the distribution that the tracker needs."""
    is_remote: ClassVar[bool] = False
    """True if it waits for a network: `finish` then gets tracking.finish_timeout seconds."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ConfigError, before any weight loads, for a config that this tracker cannot serve."""
        if cls.library is None:
            return
        try:  # not find_spec: it would take a folder wandb/ of W&B's records for the library
            importlib.metadata.version(cls.library)
        except importlib.metadata.PackageNotFoundError as error:
            raise ConfigError(
                f"tracking.report_to has '{cls.library}', which is not installed: pip install {cls.library}, or "
                "leave it out"
            ) from error

    @classmethod
    def upload_hint(cls, run_dir: Path) -> str:
        """Return how to upload later what was recorded before a failure; "" if there is no way."""
        return ""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float], table: CompletionsTable | None) -> None:
        """Log one step. `table` is given now and then."""

    def finish(self) -> None:  # noqa: B027  (optional to override)
        """Upload or write the remaining data after the last step."""


TRACKERS: Registry[type[Tracker]] = Registry("tracker", "grpo.tracking.trackers", key="tracking.report_to")
register_tracker = TRACKERS.register


def find_tracker(name: str) -> type[Tracker]:
    """Return the class of a registered name, package.module:Class or path/file.py:Class.

    Raises:
        ConfigError: for an unknown name, or a class that is not a subclass of Tracker.
    """
    kind = TRACKERS.get(name)
    if not (isinstance(kind, type) and issubclass(kind, Tracker)):
        raise ConfigError(
            f"tracking.report_to has '{name}', which is not a subclass of grpo.tracking.tracker.Tracker: let it "
            "inherit from it"
        )
    return kind


def check_trackers(config: Config) -> None:
    """Raise ConfigError if a tracker of tracking.report_to is unknown, not installed or does not fit the config."""
    for name in config.tracking.report_to:
        find_tracker(name).check(config)


def completions_table(rollouts: list[dict[str, Any]]) -> CompletionsTable:
    """Return rows of rollouts.jsonl as a table of at most MAX_ROWS rows, with a column for each reward."""
    rewards = list(rollouts[0].get("rewards") or {}) if rollouts else []
    keys = ["step", "draw", "sample", "reward", "advantage", "length", "ended", "prompt", "completion"]
    rows = [
        [row.get(key) for key in keys] + [(row.get("rewards") or {}).get(name) for name in rewards]
        for row in rollouts[:MAX_ROWS]
    ]
    return CompletionsTable(keys + [f"reward/{name}" for name in rewards], rows)
