"""Run: the parts of one training run while it lasts, what is recorded of each step, and what is saved of it."""

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from grpo.config.schema import Config, flatten, to_dict
from grpo.data.stream import PromptStream
from grpo.data.streaming import StreamedPrompts
from grpo.errors import EngineError, StorageError
from grpo.packing import PackedBatch
from grpo.policy import Policy
from grpo.rewards.scoring import RewardSum, Scores
from grpo.rewards.sources import reward_sources
from grpo.rollout.async_sampler import AsyncSampler
from grpo.rollout.engine import RolloutEngine
from grpo.run.callbacks import Callbacks, State
from grpo.run.checkpoint import save_checkpoint
from grpo.runtime.distributed import gather_rows, max_over_ranks
from grpo.runtime.run_lock import RunLock
from grpo.tracking.console import Display
from grpo.tracking.debug_dumps import dump_batches, dump_failures
from grpo.tracking.diagnostics import Diagnostics
from grpo.tracking.report import write_report
from grpo.tracking.run_logger import Tracker
from grpo.types import Group, Prompt


@dataclass
class Progress:
    """What a run has come to besides its weights. Saved with every checkpoint."""

    draws: int = 0
    """Prompts drawn so far, over all processes."""
    beta: float = 0.0
    """Weight of the KL now; the config's, unless kl_target adapts it."""


@dataclass
class Run:
    """One training run: its parts, and what is written about it."""

    config: Config
    accelerator: Accelerator
    run_dir: Path
    start: int
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    engine: RolloutEngine
    ahead: AsyncSampler
    stream: PromptStream | StreamedPrompts
    held_out: list[Prompt]
    score: RewardSum
    tracker: Tracker | None
    display: Display
    progress: Progress
    lock: RunLock | None
    callbacks: Callbacks
    steps_done: int
    watch: Diagnostics
    first_eval: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)
    unmeasured: EngineError | None = None
    """Why the last evaluation is missing, where it is."""

    def __post_init__(self) -> None:
        self.whole = (self.start, replace(self.progress))  # the last step that is complete, and what it had come to
        self.saved = self.start

    def record(self, step: int, metrics: dict[str, float], rows: list[dict] | None = None) -> None:
        """Write one step's metrics, and every rank's rollouts. Collective: every rank must call it. The step is whole then."""
        self.whole = (step, replace(self.progress))
        evaluated = {key: value for key, value in metrics.items() if key.startswith("eval/")}
        if evaluated:
            self.first_eval = self.first_eval or evaluated
            self.last_eval = evaluated
        rows = gather_rows(self.accelerator, rows) if rows is not None else []
        rows.sort(key=lambda row: (row["draw"], row["sample"]))
        self.steps_done, state = step, self.state(step, rows)
        metrics = self.callbacks.after_step(state, metrics, trained=step > self.start, evaluated=bool(evaluated))
        if self.tracker is None or not metrics:
            return
        shown = self.config.tracking.log_completions and bool(rows)
        self.tracker.log(step, metrics, rows, table=shown and self._now_and_then(step, times=20))
        for finding in self.watch.observe(step, metrics, rows):
            self.tracker.log_finding(step, finding)
            self.display.say(f"finding: {finding}")
        self.display.step(step, metrics)
        if shown and self._now_and_then(step, times=5):
            self.display.completions(rows)

    def _now_and_then(self, step: int, times: int) -> bool:
        """After the first step, and about `times` times in a run."""
        return step == 1 or step % max(1, self.config.steps // times) == 0

    def state(self, step: int, rows: list[dict]) -> State:
        """What callbacks see of the run."""
        policy = self.policy
        seen = (rows, self.run_dir, self.config, policy.model, policy.optimizer, self.tokenizer, self.accelerator)
        return State(step, self.config.steps, *seen, policy.strategy)

    def follow(self, step: int) -> None:
        """What follows the policy catches up with its weights after `step`: the engine, and a synced reference."""
        self.policy.sync_reference(step)
        self.policy.refresh_sampler()
        self.engine.update_weights(step)

    def dump_failed_batches(self, step: int, groups: list[Group], scores: Scores, skipped: list[PackedBatch]) -> None:
        """Write what rewards could not judge, and the batches of a step that changed nothing; and say so."""
        rank = self.accelerator.process_index
        for line in dump_failures(self.run_dir, step, rank, groups, scores):
            self.display.say(line)
        if skipped:
            path = dump_batches(self.run_dir, step, rank, skipped)
            self.display.say(f"step {step} was skipped: its loss or gradient is not finite. Its batches are in {path}")

    def save_on_engine_error(self, error: EngineError) -> EngineError:
        """Save what there was after the last whole step, which a failed engine cannot have touched; -> the error, with how
        to go on. Collective: engines fail on every rank at once."""
        step, self.progress = self.whole
        if step == self.saved == 0:
            return EngineError(f"{error}. Nothing was learned yet: start the run again")
        if step > self.saved:
            self.save(step)
        return EngineError(f"{error}. {step} of {self.config.steps} steps are done. {self.how_to_go_on()}")

    def how_to_go_on(self) -> str:
        return f"Everything is saved: go on with --resume auto --run_dir {self.run_dir}"

    def close(self) -> None:
        """End and give back everything, however the run ended. A second call does nothing."""
        self.ahead.close()
        self.score.close()
        self.callbacks.end(self.state(self.steps_done, []))
        if self.tracker is not None:
            with contextlib.suppress(StorageError):  # `finish` has said so, or something worse is on its way up
                self.tracker.finish()
        self.display.close()  # a progress bar hides the cursor
        if self.lock is not None:
            self.lock.release()

    def save(self, step: int, needed: bool = True) -> None:
        """A checkpoint from which `resume` goes on exactly. Where it cannot be written, the checkpoints before it stay;
        that is a StorageError if it is `needed` (the last one), otherwise a warning."""
        error: StorageError | None = None
        try:
            self._save(step)
        except StorageError as caught:
            error = caught
        if not max_over_ranks(self.accelerator, error is not None):
            return
        if needed:
            raise error or StorageError(f"the main process could not save step {step}")
        self.display.say(f"warning: {error}. Training goes on")

    def _save(self, step: int) -> None:
        self.accelerator.wait_for_everyone()
        tensors, state = self.policy.state_dict()
        sampled_ahead = gather_rows(self.accelerator, self.ahead.rows())
        if self.accelerator.is_main_process:
            state |= {
                "step": step,
                "progress": vars(self.progress),
                "sampled_ahead": sampled_ahead,
                "stream": self.stream.state_dict(),
                "config": flatten(to_dict(self.config)),
                "processes": self.accelerator.num_processes,
                "reward_sources": reward_sources(self.score.functions),
                "first_eval": self.first_eval,
                "last_eval": self.last_eval,
            }
            save_checkpoint(self.run_dir, step, tensors, state, self.config.save_total_limit)
        self.saved = step

    def finish(self) -> Path:
        """final/, the before/after table, and the path. Raises EngineError if the last evaluation could not be made."""
        if self.tracker is not None:
            self.tracker.let_go()
        self.accelerator.wait_for_everyone()
        self.policy.save(self.run_dir / "final", self.tokenizer)
        if self.accelerator.is_main_process:
            self.display.table(self.first_eval, self.last_eval, self.run_dir)
        if self.tracker is not None:
            if self.config.tracking.report:
                self.report()
            self.tracker.finish()
        if self.unmeasured is not None:
            raise EngineError(
                f"{self.unmeasured}. Training is done, and saved in {self.run_dir / 'final'}; only the last evaluation is "
                f"missing: python launch/evaluate.py --model {self.run_dir / 'final'}"
            )
        return self.run_dir

    def report(self) -> None:
        """report.md. The run is done and saved: a picture that fails must not make it a failure."""
        try:
            self.display.say(f"Report: {write_report(self.run_dir)}")
        except Exception as error:
            self.display.say(f"no report: {error!r}. Later: python launch/report.py --run {self.run_dir}")
