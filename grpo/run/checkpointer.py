"""Checkpointer: the state of a run -> checkpoints/step-N -> the same state.

Every part owns its entries: Policy its tensors, the collector its counters and its sampler, the stream its position.
"""

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from grpo.config.schema import Config, flatten, to_dict
from grpo.errors import ConfigError, StorageError
from grpo.experience import ExperienceCollector
from grpo.policy import Policy
from grpo.run.checkpoint import Tensors, load_checkpoint, newest_valid, save_checkpoint
from grpo.run.final import final_step
from grpo.runtime.distributed import gather_rows, max_over_ranks, run_on_main
from grpo.runtime.run_lock import RunLock

log = logging.getLogger(__name__)

FORMAT = 2
"""Version of the layout of state.json. 1 (not written): runs before it was counted."""


@dataclass
class ResumePoint:
    """State restored from a checkpoint; the defaults describe a new run."""

    start: int = 0
    """Steps done."""
    prompts_drawn: int = 0
    beta: float = 0.0
    """The KL coefficient."""
    sampled_ahead: list[dict[str, Any]] = field(default_factory=list)
    """Completions that were sampled in advance and not trained on yet: rows of `AsyncSampler.state_dict`."""
    limits: dict[str, int] = field(default_factory=dict)
    """tokens_per_batch and slots, which are lower than the config's after memory ran out."""
    first_eval: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Completed:
    """The counters after the last complete step."""

    step: int
    prompts_drawn: int
    beta: float


class Checkpointer:
    """Saves the state of a run.

    Args:
        evaluations: Returns the metrics of the first and of the latest evaluation.
        start: Steps done when the run was built.
        beta: The KL coefficient at that moment.
        lock: The lock of the run directory, on the main process.
        contents: sha256 of data, base model and reference (grpo/run/contents.py).
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        accelerator: Accelerator,
        policy: Policy,
        collector: ExperienceCollector,
        evaluations: Callable[[], tuple[dict[str, float], dict[str, float]]],
        *,
        start: int,
        beta: float,
        lock: RunLock | None = None,
        contents: dict[str, str] | None = None,
    ) -> None:
        self.run_dir, self.config, self.accelerator = run_dir, config, accelerator
        self.policy, self.collector, self.evaluations = policy, collector, evaluations
        self.lock, self.contents = lock, contents or {}
        self.saved = start
        """The newest step that is on disk."""
        self.step_completed(start, beta)

    def step_completed(self, step: int, beta: float) -> None:
        """Note that `step` is complete: a checkpoint of it could be written from here on."""
        self.completed = _Completed(step, self.collector.prompts_drawn, beta)

    def restore_completed(self) -> int:
        """Set the counters back to the last complete step, and return that step."""
        self.collector.prompts_drawn = self.completed.prompts_drawn
        return self.completed.step

    def save(self, step: int, needed: bool = True) -> None:
        """Save a checkpoint from which `resume` continues exactly. Collective.

        Raises:
            StorageError: It cannot be written and is `needed`. Otherwise that is a warning. Older checkpoints stay.
        """
        error: StorageError | None = None
        try:
            self._save(step)
        except StorageError as caught:
            error = caught
        if not max_over_ranks(self.accelerator, error is not None):
            return
        if needed:
            raise error or StorageError(f"the main process could not save step {step}")
        log.warning("%s. Training goes on", error)

    def _save(self, step: int) -> None:
        self.accelerator.wait_for_everyone()
        tensors, state = self.policy.state_dict()
        sampled_ahead = gather_rows(self.accelerator, self.collector.sampler.state_dict())
        first_eval, last_eval = self.evaluations()
        if self.accelerator.is_main_process:
            if self.lock is not None:
                self.lock.check()
            state |= {
                "format": FORMAT,
                "step": step,
                "progress": {"draws": self.collector.prompts_drawn, "beta": self.completed.beta},
                "limits": self.collector.limits(),
                "sampled_ahead": sampled_ahead,
                "stream": self.collector.prompts.state_dict(),
                "config": flatten(to_dict(self.config)),
                "processes": self.accelerator.num_processes,
                "reward_sources": self.collector.rewards.sources,
                "contents": self.contents,
                "first_eval": first_eval,
                "last_eval": last_eval,
            }
            save_checkpoint(self.run_dir, step, tensors, state, self.config.save_total_limit)
        self.saved = step


def find_checkpoint(config: Config, run_dir: Path) -> Path | None:
    """Return the checkpoint that `resume` names; None for a new run.

    Raises:
        ConfigError: The folder does not exist, or holds no checkpoint.
        StorageError: There are checkpoints, and none is whole. A new start would overwrite what the run recorded.
    """
    if config.resume is None:
        return None
    if config.resume == "auto":
        newest = _newest(run_dir)
        if newest is None:
            near = _runs_beside(run_dir)
            hint = f"; runs with checkpoints beside it: {', '.join(near)}" if near else ""
            log.info("resume auto: no checkpoint in %s: the run starts at step 0%s", run_dir, hint)
        return newest
    path = Path(config.resume)
    if not path.is_dir():
        raise ConfigError(f"resume: there is no folder {path}. Use --resume auto for the newest in {run_dir}")
    if (path / "manifest.json").is_file() or (path / "state.json").is_file():
        return path
    runs = [folder for folder in (path, path.parent) if (folder / "checkpoints").is_dir()]
    if path.parent in runs and path.name != "checkpoints":  # RUN/final has weights only
        runs.remove(path.parent)
    found = _newest(runs[0]) if runs else None
    if found is None:
        raise ConfigError(
            f"resume: {path} holds no complete checkpoint. Give a run directory or one of its checkpoints: "
            f"--resume RUN/checkpoints/step-N"
        )
    return found


def _newest(run_dir: Path) -> Path | None:
    path_or_none, ignored = newest_valid(run_dir)
    for reason in ignored:
        log.warning(reason)
    if path_or_none is None and ignored:
        raise StorageError(
            f"no checkpoint in {run_dir / 'checkpoints'} is whole ({len(ignored)} damaged): {ignored[0]}. Copy them "
            "again from where they are whole, or start a new run in another run_dir"
        )
    return path_or_none


def _runs_beside(run_dir: Path) -> list[str]:
    """Return folders beside `run_dir` that hold checkpoints, those with a similar name first: it may be misspelt."""
    try:
        found = [path.parent for path in run_dir.parent.glob("*/checkpoints") if path.parent != run_dir]
        names = {path.name: str(path) for path in found if any(path.glob("checkpoints/step-*"))}
    except OSError:
        return []
    near = difflib.get_close_matches(run_dir.name, names, n=3, cutoff=0.0)
    return [names[name] for name in near]


def migrate(state: dict[str, Any]) -> dict[str, Any]:
    """Bring state.json of an older trainer to today's format."""
    state = dict(state)
    if "progress" not in state:  # before draws were counted, each step drew prompts_per_step, and beta was the config's
        config = state["config"]
        state["progress"] = {
            "draws": state["step"] * config["prompts_per_step"],
            "beta": config.get("objective.beta", 0.0),
        }
    defaults: dict[str, Any] = {
        "limits": {},
        "sampled_ahead": [],
        "stream": {},
        "skipped_in_a_row": 0,
        "reward_sources": {},
        "contents": {},
    }
    return defaults | state | {"format": FORMAT}


def check_is_unfinished(checkpoint: Path, step: int, config: Config, run_dir: Path) -> None:
    """Raise ConfigError if the run has done all steps and written final/. Where only final/ is missing, it goes on."""
    if step > config.steps or (step == config.steps and final_step(run_dir) == step):
        raise ConfigError(f"{checkpoint} has done all {config.steps} steps: raise steps to go on")
    if step == config.steps:
        log.info("resume: all %d steps are done, but final/ is not of step %d: writing it", step, step)


def restore(checkpoint: Path, config: Config, policy: Policy, stream: Any) -> ResumePoint:
    """Load a checkpoint into the policy and the prompt stream. Collective."""
    tensors, state = read_checkpoint(checkpoint, policy)
    state = migrate(state)
    policy.load_state_dict(tensors, state)
    del tensors  # whole, on the main process, where the weights are sharded
    stream.load_state_dict(state["stream"])
    start, progress = state["step"], state["progress"]
    log.info("resuming from %s: %d of %d steps are done", checkpoint, start, config.steps)
    return ResumePoint(
        start,
        progress["draws"],
        progress["beta"],
        state["sampled_ahead"],
        {name: value for name, value in state["limits"].items() if _is_unchanged(name, state["config"], config)},
        state["first_eval"],
        state["last_eval"],
    )


def _is_unchanged(limit: str, saved: dict[str, Any], config: Config) -> bool:
    """Return whether the config still has the value that `limit` was lowered from."""
    key = {"slots": "rollout.slots", "gives_up_memory": "tokens_per_batch"}.get(limit, limit)
    return bool(saved.get(key) == flatten(to_dict(config))[key])


def read_checkpoint(checkpoint: Path, policy: Policy) -> tuple[Tensors, dict[str, Any]]:
    """Read a checkpoint; its tensors only on the main process where the strategy distributes them from there."""
    if not policy.broadcasts_checkpoint:
        return load_checkpoint(checkpoint)
    tensors: Tensors = {}

    def read() -> dict[str, Any]:
        nonlocal tensors
        tensors, state = load_checkpoint(checkpoint)
        return state

    state = run_on_main(policy.accelerator, read)
    return tensors, state
