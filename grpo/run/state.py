"""Run: the parts of one training run while it lasts, and the few operations that involve several of them."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from grpo.config.schema import Config
from grpo.data.curriculum import Curriculum
from grpo.errors import EngineError, StorageError
from grpo.experience import ExperienceCollector, Sampled
from grpo.kl import adapted_beta
from grpo.policy import Policy
from grpo.rollout.engine import RolloutEngine
from grpo.rollout.evaluation import evaluate
from grpo.run.best import BestModel
from grpo.run.checkpointer import Checkpointer
from grpo.run.final import write_final
from grpo.run.records import Recorder
from grpo.runtime.distributed import gather_rows
from grpo.runtime.oom import phase
from grpo.runtime.run_lock import LockLost, RunLock
from grpo.types import Prompt

log = logging.getLogger(__name__)


def _nothing(folder: Path) -> None:
    """Write nothing: the main process copies the best model alone."""


@dataclass
class Run:
    """The parts of one training run. Built by `grpo.run.build.build_run`."""

    config: Config
    accelerator: Accelerator
    run_dir: Path
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    engine: RolloutEngine
    collector: ExperienceCollector
    held_out: list[Prompt]
    recorder: Recorder
    checkpointer: Checkpointer
    start: int
    """Steps done when the run was built: 0 unless it was resumed."""
    beta: float
    """The KL coefficient now: objective.beta, unless kl_target adapts it."""
    lock: RunLock | None = None
    """Lock of the run directory, on the main process."""
    save_dtype: torch.dtype = torch.float32
    """Data type of final/."""
    best: BestModel | None = None
    """The model of the best evaluation, with load_best_model_at_end."""
    evaluation_error: EngineError | None = None
    """Reason why the last evaluation is missing."""

    @phase("evaluating")
    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate the held-out prompts as `evaluation` says and record every item. Collective.

        Returns no metrics where nothing is held out, or where the engine fails: the step is complete without them, and
        sampling the next one will fail too.
        """
        if not self.held_out:
            return {}
        chosen = self.config.evaluation
        try:
            evaluation = evaluate(
                self.engine,
                self.held_out,
                self.accelerator,
                max_completion_length=self.config.sampling.max_completion_length,
                samples=chosen.num_generations,
                temperature=chosen.temperature,
                limits={name: getattr(chosen, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")},
                prose=self.config.data.extractor == "quoted_terms",
                rewards=self.collector.rewards,
            )
        except EngineError as error:
            self.evaluation_error = error
            return {}
        self.recorder.log_evaluation(step, evaluation.rows)
        if self.best is not None and step:
            main = self.accelerator.is_main_process
            self.best.keep(step, self.config.steps, evaluation.metrics, self._save_model, main=main)
        return evaluation.metrics

    def sync_weights(self, step: int) -> None:
        """Sync the reference, where it is updated, and the engine with the weights after `step`. Collective."""
        self.policy.sync_reference(step)
        self.policy.refresh_sampler()
        self.engine.update_weights(step)

    def update_curriculum(self, sampled: Sampled) -> dict[str, float]:
        """Report to the curriculum how every rank's groups scored. Returns its metrics; none without a curriculum."""
        curriculum = self.collector.prompts
        if not isinstance(curriculum, Curriculum):
            return {}
        means = sampled.scores.by_name[str(self.config.curriculum.reward)].nanmean(dim=1).tolist()
        mine = [{"draw": group.prompt.draw, "mean": mean} for group, mean in zip(sampled.groups, means, strict=True)]
        everyone = gather_rows(self.accelerator, mine)
        curriculum.update([(row["draw"], row["mean"]) for row in everyone if row["mean"] == row["mean"]])
        return curriculum.metrics()

    def adapt_beta(self, metrics: dict[str, float]) -> None:
        """Move the KL coefficient so that policy/kl approaches objective.kl_target, where that is set."""
        objective = self.config.objective
        if objective.kl_target is None:
            return
        metrics["policy/beta"] = self.beta
        if "policy/kl" not in metrics:  # no token was trained
            return
        completions = self.config.prompts_per_step * self.config.sampling.num_generations
        self.beta = adapted_beta(
            self.beta, metrics["policy/kl"], objective.kl_target, completions, objective.kl_horizon
        )

    def save_on_engine_error(self, error: EngineError) -> EngineError:
        """Save the last complete step, which a failed engine cannot change. Collective: engines fail on all ranks.

        Returns:
            The error with how to resume.
        """
        step = self.checkpointer.restore_completed()
        if step == self.checkpointer.saved == 0:
            return EngineError(f"{error}. Nothing was learned yet: start the run again")
        if step > self.checkpointer.saved:
            self.save(step, last=True)
        return EngineError(f"{error}. {step} of {self.config.steps} steps are done. {self.resume_hint()}")

    def save(self, step: int, *, last: bool) -> None:
        """Save a checkpoint. Where the last one cannot be written, write final/, which takes less space. Collective.

        Raises:
            StorageError: The last checkpoint cannot be written. Before the last one, that is a warning.
        """
        try:
            self.checkpointer.save(step, needed=last)
            self.recorder.saved(step)
        except StorageError as error:
            if isinstance(error, LockLost):
                raise
            try:
                self._write_final(step)
            except StorageError as second:
                raise StorageError(f"{error}. {second}") from error
            raise StorageError(
                f"{error}. The model after step {step} is in {self.run_dir / 'final'}; without the checkpoint, "
                f"--resume auto goes on from an older one"
            ) from error

    def _save_model(self, folder: Path) -> None:
        self.policy.save(folder, self.tokenizer, self.save_dtype)

    def _write_final(self, step: int) -> None:
        main = self.accelerator.is_main_process
        save = self._save_model
        if step == self.config.steps and self.best is not None and self.best.value is not None:
            log.info("final/ is the model after step %d, the best of all evaluations", self.best.step)
            save = self.best.copy if main else _nothing
        write_final(self.run_dir, step, self.config.steps, save, main=main)

    def resume_hint(self) -> str:
        """Return how to resume this run."""
        return f"Everything is saved: go on with --resume auto --run_dir {self.run_dir}"

    def finish(self) -> Path:
        """Write final/ and the report. Collective.

        Raises:
            EngineError: The last evaluation could not be made.
        """
        self.recorder.begin_shutdown()
        self.accelerator.wait_for_everyone()
        self._write_final(max(self.start, self.checkpointer.completed.step))
        self.recorder.finish()
        if self.evaluation_error is not None:
            raise EngineError(
                f"{self.evaluation_error}. Training is done, and saved in {self.run_dir / 'final'}; only the last "
                f"evaluation is missing: python launch/evaluate.py --model {self.run_dir / 'final'}"
            )
        return self.run_dir

    def close(self) -> None:
        """Release all resources. Idempotent."""
        self.collector.sampler.close()
        self.collector.rewards.close()
        if self.engine.turns is not None:
            self.engine.turns.close()
        self.recorder.close()
        if self.lock is not None:
            self.lock.release()
