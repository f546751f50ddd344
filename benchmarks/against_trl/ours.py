"""One run of this trainer, and the time of its decoding steps."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from against_trl.measuring import loaded_memory, peak_memory
from against_trl.suites import PHASES, REWARDS, Suite, forced_lengths


def run_ours(suite: Suite, folder: Path, _name: str) -> dict:
    """Run our trainer like launch/train.py, with completions of forced lengths.

    Returns:
        {"steps": [...], "memory_gib": ..., "shape": {...}}
    """
    from grpo.config.parser import load_config
    from grpo.run.build import build_run
    from grpo.runtime.signals import Signals
    from grpo.trainer import training_loop

    prompt_tokens = register_forced_engine(suite)
    with tempfile.TemporaryDirectory() as temporary:
        chosen = settings(suite, folder, f"{temporary}/run")
        run = build_run(load_config([f"--{key}={value}" for key, value in chosen.items()]))
        moments = [part for state in run.policy.optimizer.state.values() for part in state.values()]
        # TRL's optimizer allocates its moments in the first step, and ours when the run is built: both count.
        before = loaded_memory(suite.device) - sum(part.nbytes for part in moments) / 2**30
        with Signals() as signals:
            training_loop(run, signals)
        memory = peak_memory(suite.device) - before
        run.close()
        rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    completions = suite.prompts_per_step * suite.num_generations
    steps = [
        {phase: row[f"time/{phase}"] for phase in PHASES}
        | {
            "tokens": row["rollout/length_mean"] * completions,
            "prompt_tokens": prompt_tokens[row["step"] - 1],
            "mean_reward": row["reward/mean"],
            "padding_fraction": 0.0,
        }
        for row in rows
        if row["step"] > 1
    ]
    linear = [module for module in run.policy.model.modules() if hasattr(module, "in_features")]
    head = run.policy.model.get_output_embeddings()
    shape = {
        "linear_weights": sum(module.weight.numel() for module in linear if module is not head),
        "head_weights": head.weight.numel(),
        "cache_numbers_per_position": run.engine.position_numbers,
    }
    return {"steps": steps, "memory_gib": memory, "shape": shape}


def settings(suite: Suite, folder: Path, run_dir: str) -> dict[str, Any]:
    """Return the config of the run, by key."""
    return {
        "model.name": folder / "model",
        "data.path": folder / "rows.jsonl",
        "data.system_prompt": "null",
        "data.max_prompt_length": 256,
        "run_dir": run_dir,
        "steps": suite.steps + 1,
        "prompts_per_step": suite.prompts_per_step,
        "sampling.num_generations": suite.num_generations,
        "sampling.max_completion_length": suite.max_completion_length,
        "optimizer.learning_rate": 1e-5,
        "optimizer.lr_scheduler_type": "constant",
        "objective.beta": 0.04,
        "rollout.engine": "forced",
        "tokens_per_batch": suite.tokens_per_batch,
        "eval_every": 0,
        "tracking.report_to": "[]",
        "tracking.log_completions": "false",
        "rewards": json.dumps(dict.fromkeys(REWARDS, 1.0)),
    }


def register_forced_engine(suite: Suite) -> list[int]:
    """Register the engine "forced": the native engine, but each completion ends at its forced length.

    Returns:
        A list that grows with each step: the number of prompt tokens.
    """
    from grpo.rollout.engine import register_engine
    from grpo.rollout.native_engine import NativeEngine

    prompt_tokens: list[int] = []

    @register_engine("forced")
    class Forced(NativeEngine):
        """Native engine that ends each completion at its forced length."""

        def generate(self, prompts: Any, plan: Any, *args: Any, **kwargs: Any) -> Any:
            self.lengths: list[int] = []
            # Other calls are the check of the engine at the start.
            if len(prompts) * plan.num_generations == suite.prompts_per_step * suite.num_generations:
                self.lengths = forced_lengths(suite, len(prompt_tokens))
                prompt_tokens.append(sum(len(prompt.token_ids) for prompt in prompts))
            return super().generate(prompts, plan, *args, **kwargs)

        def end_of(self, row: Any, new_tokens: list[int]) -> int | None:
            if not self.lengths:
                return super().end_of(row, new_tokens)
            last = self.lengths[row.prompt * suite.num_generations + row.sample] - 1 - len(row.tokens)
            return last if last < len(new_tokens) else None

    return prompt_tokens


def decode_times(suite: Suite, folder: Path) -> str:
    """Return the milliseconds per decoding step with 32, 16, 8 and 4 rows.

    Each is the best of three measurements of 63 tokens, without prefill.
    """
    import torch

    from grpo.data.tokenizer import load_tokenizer
    from grpo.models.loading import load_model
    from grpo.models.logprob_model import use_grpo_attention
    from grpo.rollout.native_engine import NativeEngine
    from grpo.runtime.device import cpu_threads
    from grpo.types import Prompt, SamplingPlan

    torch.set_num_threads(cpu_threads(1))
    model, tokenizer = load_model(str(folder / "model")), load_tokenizer(str(folder / "model"))
    model.to(suite.device)
    engine = NativeEngine(model, tokenizer, slots=256, uses_packed_attention=use_grpo_attention(model))
    engine.end_ids = set()  # nothing ends early
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()][:4]
    prompts = [Prompt(i, row["question"], tuple(tokenizer(row["question"])["input_ids"])) for i, row in enumerate(rows)]
    lines = []
    for group in (8, 4, 2, 1):
        seconds = {}
        for tokens in (1, 64):
            engine.generate(prompts, SamplingPlan(group, tokens, 1.0, 0))
            times = []
            for _ in range(3):
                started = time.perf_counter()
                engine.generate(prompts, SamplingPlan(group, tokens, 1.0, 0))
                times.append(time.perf_counter() - started)
            seconds[tokens] = min(times)
        lines.append(f"{4 * group:3} rows: {(seconds[64] - seconds[1]) / 63 * 1000:.2f} ms per token")
    return "\n".join(lines)
