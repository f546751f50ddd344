"""Weights & Biases."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.config.schema import TrackingConfig
from grpo.runtime.env import load_keys
from grpo.tracking.tracker import CompletionsTable, TrackedRun, Tracker, register_tracker

log = logging.getLogger(__name__)


def names_of(run: TrackedRun) -> dict[str, Any]:
    """Return project, name and group of a run. W&B's environment variables win over defaults, not over the config."""
    chosen_project = run.settings.get("tracking.project") != TrackingConfig().project
    chosen_name = run.settings.get("tracking.run_name") is not None
    return {
        "project": run.project if chosen_project else os.environ.get("WANDB_PROJECT") or run.project,
        "name": run.name if chosen_name else os.environ.get("WANDB_NAME") or run.name,
        "group": os.environ.get("WANDB_RUN_GROUP") or None,
    }


@register_tracker("wandb")
class Wandb(Tracker):
    """W&B, offline without WANDB_API_KEY.

    A resumed run continues under its id, read from W&B's folder in the run directory. W&B ignores steps that it
    already has.
    """

    library = "wandb"
    is_remote = True

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        import wandb

        load_keys()
        mode: Any = os.environ.get("WANDB_MODE")
        if not mode:
            # Decided before init, which without a key would ask for one or wait for the network.
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
            if mode == "offline":
                log.warning(
                    "no WANDB_API_KEY (.env.example): W&B records offline. Later: wandb sync %s/wandb/*", run.run_dir
                )
        known = sorted((run.run_dir / "wandb").glob("*run-*-*"), key=lambda folder: folder.name.split("run-")[1])
        resumed: dict[str, Any] = {}
        if run.resume_step > 0 and known:
            resumed = {"id": known[-1].name.rpartition("-")[2], "resume": "allow"}
        self._table = wandb.Table
        self._wandb_run = wandb.init(**names_of(run), config=run.settings, dir=str(run.run_dir), mode=mode, **resumed)

    @classmethod
    def upload_hint(cls, run_dir: Path) -> str:
        return f"to upload it later: wandb sync {run_dir}/wandb/*run-*"

    def log(self, step: int, metrics: Mapping[str, float], table: CompletionsTable | None) -> None:
        logged: dict[str, Any] = dict(metrics)
        if table is not None:
            logged["completions"] = self._table(columns=[*table.columns], data=table.rows)
        self._wandb_run.log(logged, step=step)

    def finish(self) -> None:
        self._wandb_run.finish()
