"""One run of TRL's GRPOTrainer with timers around its phases."""

import tempfile
import time
from pathlib import Path
from typing import Any

from against_trl.measuring import loaded_memory, peak_memory
from against_trl.suites import REWARDS, Suite, forced_lengths
from grpo.errors import ConfigError


def run_trl(suite: Suite, folder: Path, name: str) -> dict:
    """Run TRL's GRPOTrainer with timers around its phases.

    Returns:
        {"steps": [...], "memory_gib": ...}

    Raises:
        ConfigError: if TRL is not installed.
    """
    try:
        import trl
    except ImportError as error:
        raise ConfigError('the benchmark compares with TRL: pip install -e ".[benchmark]"') from error
    import torch

    from grpo.data.tokenizer import load_tokenizer
    from grpo.models.loading import load_model
    from grpo.rewards.registry import REWARDS as registered
    from grpo.runtime.device import cpu_threads

    torch.set_num_threads(cpu_threads(1))
    tokenizer = load_tokenizer(str(folder / "model"))
    timing = Timing(suite)
    with tempfile.TemporaryDirectory() as temporary:
        model = load_model(str(folder / "model"))  # float32 and without dropout, like ours
        force_lengths(suite, model, tokenizer.eos_token_id, timing)
        trainer = timed(trl.GRPOTrainer, timing)(
            model=model,
            args=trl.GRPOConfig(**arguments(suite, temporary, is_tuned=name == "trl_tuned")),
            train_dataset=prompts_in_our_order(suite, folder),
            reward_funcs=[registered.get(reward) for reward in REWARDS],
            processing_class=tokenizer,
            callbacks=[step_timer(timing)],
        )
        before = loaded_memory(suite.device)
        trainer.train()
        memory = peak_memory(suite.device) - before
    return {"steps": timing.steps[1:], "memory_gib": memory}


def arguments(suite: Suite, output_dir: str, *, is_tuned: bool) -> dict[str, Any]:
    """Return the arguments of GRPOConfig."""
    completions = suite.prompts_per_step * suite.num_generations
    micro_batch = min(suite.trl_micro_batch if is_tuned else 8, completions)
    return {
        "output_dir": output_dir,
        "max_steps": suite.steps + 1,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": completions // micro_batch,
        "num_generations": suite.num_generations,
        "max_completion_length": suite.max_completion_length,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "beta": 0.04,
        "temperature": 1.0,
        "bf16": suite.precision == "bf16",
        "use_cpu": suite.device == "cpu",
        "gradient_checkpointing": not is_tuned,
        "disable_dropout": is_tuned,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }


def prompts_in_our_order(suite: Suite, folder: Path) -> Any:
    """Return the dataset with the prompts of all steps, in the order in which our trainer takes them."""
    from datasets import Dataset

    from grpo.config.schema import DataConfig
    from grpo.data.rows import load_examples
    from grpo.data.stream import PromptStream
    from grpo.types import Prompt

    examples = load_examples(DataConfig(name="gsm8k", path=str(folder / "rows.jsonl"), system_prompt=None), "train", 0)
    stream = PromptStream([Prompt(i, e.messages, (), e.columns) for i, e in enumerate(examples)], seed=0)
    order = [prompt for step in range(suite.steps + 1) for prompt in stream.take(step, suite.prompts_per_step)]
    return Dataset.from_list([{"prompt": prompt.messages, "answer": prompt.columns["answer"]} for prompt in order])


class Timing:
    """Seconds of the phases of the current step, and the steps that have ended."""

    def __init__(self, suite: Suite) -> None:
        self.completions = suite.prompts_per_step * suite.num_generations
        self.seconds: dict[str, float] = {}
        self.positions, self.padded_positions = 0, 0
        self.steps: list[dict[str, Any]] = []

    def start_step(self) -> None:
        """Forget the seconds of the step before."""
        self.seconds, self.positions, self.padded_positions = {}, 0, 0
        self.started = time.perf_counter()

    def end_step(self) -> None:
        """Add a row to `steps`. What no other phase took is the update."""
        total = time.perf_counter() - self.started
        phases = {phase: self.seconds.get(phase, 0.0) for phase in ("rollout", "reward", "reference")}
        padding = 1 - self.positions / self.padded_positions
        row = {"step": total, **phases, "update": total - sum(phases.values()), "padding_fraction": padding}
        self.steps.append(row)

    def measure(self, phase: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Call, and add the seconds to a phase."""
        started = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def force_lengths(suite: Suite, model: Any, end: int, timing: Timing) -> None:
    """End each completion that `model` generates at its forced length.

    The end token is impossible before, and certain there.
    """
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    class Forced(LogitsProcessor):
        def __init__(self, prompt_width: int) -> None:
            self.lengths, self.width = forced_lengths(suite, len(timing.steps)), prompt_width

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            drawn = input_ids.shape[1] - self.width
            scores[:, end] = -torch.inf
            last = [row for row, length in enumerate(self.lengths) if length == drawn + 1]
            if last:
                scores[last] = -torch.inf
                scores[last, end] = 0.0
            return scores

    generate = model.generate

    def forced(input_ids: Any, **kwargs: Any) -> Any:
        assert len(input_ids) == timing.completions, "TRL samples all completions of a step in one call"
        return generate(input_ids, logits_processor=LogitsProcessorList([Forced(input_ids.shape[1])]), **kwargs)

    model.generate = forced


def timed(trainer: Any, timing: Timing) -> Any:
    """Return a subclass of TRL's trainer whose phases are timed."""
    import torch

    class Timed(trainer):  # type: ignore[misc, valid-type]
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            return timing.measure("rollout", super()._generate_single_turn, *args, **kwargs)

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            return timing.measure("reward", super()._calculate_rewards, *args, **kwargs)

        def _get_per_token_logps_and_entropies(self, model: Any, ids: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            call = super()._get_per_token_logps_and_entropies
            if not torch.is_grad_enabled():
                return timing.measure("reference", call, model, ids, mask, *args, **kwargs)
            timing.positions += int(mask.sum())
            timing.padded_positions += mask.numel()
            return call(model, ids, mask, *args, **kwargs)

    return Timed


def step_timer(timing: Timing) -> Any:
    """Return the callback that starts and ends steps, and adds what TRL logs of them."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            timing.start_step()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            timing.end_step()

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict | None = None, **__: Any) -> None:
            if logs and "reward" in logs and timing.steps:
                timing.steps[-1]["mean_reward"] = logs["reward"]
                timing.steps[-1]["tokens"] = logs["completions/mean_length"] * timing.completions

    return StepTimer()
