"""Benchmark: this trainer and TRL on the same work, in alternating processes -> one table and one JSON file.

python launch/benchmark.py --suite cpu-tiny [--output FILE.json] [--profile FILE.txt]
python launch/benchmark.py --suite cpu-gsm8k --data.path train.jsonl [--output FILE.json]
python launch/benchmark.py --suite cpu-135m --data.path train.jsonl --precision bf16 --busy 1
python launch/benchmark.py --suite cpu-gsm8k --data.path train.jsonl --decode    milliseconds per token of our engine
python launch/benchmark.py --readme docs/results/cpu-*.json                      the table of README.md

Both trainers get the same model folder, prompts in the same order, reward functions, group size, optimizer and
precision. They also get the same completion lengths. Untrained models do not end their completions, and runs with
different lengths cannot be compared. So each completion ends at a length drawn beforehand: log-normal with the
suite's mean, the longest at the limit. TRL runs twice: with its defaults (micro-batches of 8, gradient
checkpointing), and tuned (no checkpointing, no dropout, steps_per_generation equal to accumulation, so that no
old-logprob pass runs). Ratios are TRL divided by ours: above 1, ours is better. Needs: pip install -e ".[benchmark]"
"""

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grpo.errors import ConfigError
from grpo.runtime.command import run_main

REWARDS = ["xmlcount", "soft_format", "strict_format", "int", "correctness"]
PHASES = ["step", "rollout", "reward", "reference", "update"]


@dataclass(frozen=True)
class Suite:
    """One size of work."""

    prompts_per_step: int
    num_generations: int
    max_completion_length: int
    mean_length: int
    steps: int
    """Measured steps of each run. One step before them is not measured."""
    rounds: int
    tokens_per_batch: int
    """tokens_per_batch of our trainer, about one group."""
    hidden_size: int
    layers: int
    vocabulary: int
    intermediate_size: int = 0
    """0 = a tiny model (a small Qwen2 with a few supervised steps); otherwise random weights of this shape."""
    heads: int = 0
    key_value_heads: int = 0
    gsm8k: bool = True
    """Prompts from a GSM8K file (--data.path), else generated arithmetic."""
    device: str = "cpu"
    precision: str = "no"
    trl_micro_batch: int = 8
    """Micro-batch of TRL tuned. TRL's default is 8."""
    family: str = "qwen2"
    """Architecture of the random model: qwen2 or llama."""
    warm_up_steps: int = 10


SUITES = {
    "cpu-tiny": Suite(4, 8, 64, 32, 4, 2, 512, hidden_size=128, layers=4, vocabulary=600, gsm8k=False),
    "cpu-gsm8k": Suite(4, 8, 128, 86, 3, 2, 512, hidden_size=256, layers=6, vocabulary=8192),
    "cpu-gsm8k-long": Suite(4, 16, 200, 86, 2, 2, 512, hidden_size=256, layers=6, vocabulary=8192),
    # The shape of SmolLM2-135M.
    "cpu-135m": Suite(4, 8, 128, 86, 2, 2, 2048, 576, 30, 49152, 1536, 9, 3, family="llama"),
    # The shapes of Qwen2.5-0.5B and Qwen2.5-1.5B.
    "gpu-0.5b": Suite(
        8, 16, 786, 250, 3, 2, 16384, 896, 24, 151936, 4864, 14, 2, device="cuda", precision="bf16", trl_micro_batch=16
    ),
    "gpu-1.5b": Suite(
        8, 16, 786, 250, 3, 2, 16384, 1536, 28, 151936, 8960, 12, 2, device="cuda", precision="bf16", trl_micro_batch=16
    ),
}
RUNNERS = ["ours", "trl_default", "trl_tuned"]


def main() -> None:
    """Run the benchmark, or one worker of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES)
    parser.add_argument(
        "--data.path", dest="data_path", help="GSM8K training rows (JSONL), for the gsm8k and gpu suites"
    )
    parser.add_argument("--output", help="write the JSON here")
    parser.add_argument("--profile", help="then write a profile of our trainer and of TRL tuned here")
    parser.add_argument("--steps", type=int, help="measured steps of each run, instead of the suite's")
    parser.add_argument("--rounds", type=int, help="runs of each trainer, instead of the suite's")
    parser.add_argument(
        "--dry_run", action="store_true", help="only test that the suite runs, with a narrow model on the CPU"
    )
    parser.add_argument(
        "--precision", choices=["no", "bf16"], help="mixed precision of both trainers, instead of the suite's"
    )
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="run N processes meanwhile that keep one core busy each"
    )
    parser.add_argument(
        "--runners", nargs="+", choices=RUNNERS, default=RUNNERS, help="measure only these (ours and trl_tuned, or one)"
    )
    parser.add_argument("--decode", action="store_true", help="only time our engine: milliseconds per token, by rows")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="CPU suites on a shared machine: one thread each, CPU seconds instead of wall-clock seconds",
    )
    parser.add_argument(
        "--readme", nargs="+", metavar="JSON", help="print the README's table of these results, and stop"
    )
    parser.add_argument("--worker", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.readme:
        print(readme_table([json.loads(Path(path).read_text()) for path in flags.readme]))
        return
    if not flags.suite:
        raise ConfigError(f"--suite is missing: one of {', '.join(SUITES)}")
    suite = chosen_suite(flags)
    if flags.worker:
        if flags.cpu_time:
            count_cpu_time()
        with profiled(suite, flags.profile, flags.worker):
            result = (run_ours if flags.worker == "ours" else run_trl)(suite, Path(flags.folder), flags.worker)
        (Path(flags.folder) / "result.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_work(suite, folder, flags.data_path)
        if flags.decode:
            print(decode_times(suite, folder))
            return
        measured = [machine_rates(suite, one_thread=flags.cpu_time)]
        runs: dict[str, list[dict]] = {name: [] for name in flags.runners}
        for number in range(suite.rounds):
            for name in runs:
                print(f"round {number + 1} of {suite.rounds}: {name}", file=sys.stderr, flush=True)
                with busy_processes(flags.busy):
                    runs[name].append(worker(flags, suite, name, folder))
            measured.append(machine_rates(suite, one_thread=flags.cpu_time))
        # The best of several times, because a cloud machine is slow at times.
        rates = {name: max(rates[name] for rates in measured) for name in measured[0]}
        report = summarize(flags, suite, runs, rates)
        if flags.profile:
            Path(flags.profile).parent.mkdir(parents=True, exist_ok=True)
            Path(flags.profile).write_text(table(report) + "\n")
            for name in [name for name in runs if name != "trl_default"]:
                worker(flags, replace(suite, steps=1), name, folder, profile=True)
    print(table(report))
    if flags.output:
        Path(flags.output).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.output).write_text(json.dumps(report, indent=1) + "\n")


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run `count` processes that compete for the cores. Each ends at the latest when this process ends."""
    loop = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(10000))"
    processes = [subprocess.Popen([sys.executable, "-S", "-c", loop]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def count_cpu_time() -> None:
    """Limit this process to one core, and let its clock count CPU time.

    Time spent waiting for other processes is then not counted. That is only our rewards, a few milliseconds.
    """
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    time.perf_counter = time.process_time


def chosen_suite(flags: argparse.Namespace) -> Suite:
    """Return the suite with the changes of the flags.

    Raises:
        ConfigError: for a GPU suite without a GPU.
    """
    import torch

    suite = SUITES[flags.suite]
    if flags.dry_run:
        shape = {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 4} if suite.heads else {}
        shape |= {"vocabulary": 9000} if suite.heads else {}
        suite = replace(suite, device="cpu", max_completion_length=24, mean_length=10, prompts_per_step=2, **shape)
        suite = replace(suite, steps=1, rounds=1, tokens_per_batch=1024, num_generations=4, trl_micro_batch=4)
    elif suite.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"suite {flags.suite} needs a CUDA device, and torch {torch.__version__} sees none here: run it where "
            "there is one, or add --dry_run to walk the same path with a narrow model on the CPU"
        )
    return replace(
        suite,
        steps=flags.steps or suite.steps,
        rounds=flags.rounds or suite.rounds,
        precision=flags.precision or suite.precision,
    )


def forced_lengths(suite: Suite, step: int) -> list[int]:
    """Return the length of each completion of a step.

    They are quantiles of a log-normal distribution, scaled to the suite's mean and cut at the limit. The longest has
    the limit. Their order depends on the step.
    """
    count, limit = suite.prompts_per_step * suite.num_generations, suite.max_completion_length
    normal = statistics.NormalDist()
    shape = [math.exp(0.7 * normal.inv_cdf((index + 0.5) / count)) for index in range(count - 1)]

    def scaled(factor: float) -> list[int]:
        return [max(1, min(limit, round(factor * value))) for value in shape] + [limit]

    low, high = 0.0, float(limit) * 10
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if statistics.fmean(scaled(middle)) < suite.mean_length else (low, middle)
    lengths = scaled(low)
    random.Random(f"lengths {step}").shuffle(lengths)
    return lengths


def make_work(suite: Suite, folder: Path, data_path: str | None) -> None:
    """Write the model and the prompts for both trainers into `folder`: model/ and rows.jsonl."""
    from grpo.data.arithmetic import generate_problems
    from grpo.models.tiny import GSM8K_RECIPE, Recipe, make_tiny_model

    if suite.gsm8k and not data_path:
        raise ConfigError("this suite needs GSM8K rows: add --data.path train.jsonl")
    rows: list[dict] = (
        [json.loads(line) for line in Path(data_path).read_text(encoding="utf-8").splitlines() if line.strip()]
        if suite.gsm8k and data_path
        else list(generate_problems(2000, seed=0, split="train"))
    )
    needed = suite.prompts_per_step * (suite.steps + 1)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[: max(needed, 64)]))
    if suite.intermediate_size:
        make_random_model(suite, folder / "model", [text for row in rows for text in (row["question"], row["answer"])])
        return
    recipe = replace(
        GSM8K_RECIPE if suite.gsm8k else Recipe(),
        hidden_size=suite.hidden_size,
        layers=suite.layers,
        heads=suite.hidden_size // 32,
        key_value_heads=suite.hidden_size // 128,
        vocabulary=suite.vocabulary,
        steps=suite.warm_up_steps,
        batch=16,
    )
    model = make_tiny_model(seed=0, problems=rows, recipe=recipe)
    (folder / "model").symlink_to(model)


def make_random_model(suite: Suite, folder: Path, texts: list[str]) -> None:
    """Save random weights in the shape of a real model, and a tokenizer made from the texts, without any download."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen2Config

    from grpo.models.tiny import make_tokenizer

    tokenizer = make_tokenizer(texts, 8192)
    torch.manual_seed(0)
    kind = {"qwen2": Qwen2Config, "llama": LlamaConfig}[suite.family]
    config = kind(
        vocab_size=suite.vocabulary,
        hidden_size=suite.hidden_size,
        intermediate_size=suite.intermediate_size,
        num_hidden_layers=suite.layers,
        num_attention_heads=suite.heads,
        num_key_value_heads=suite.key_value_heads,
        max_position_embeddings=4096,
        rope_theta=1e6 if suite.family == "qwen2" else 1e5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def worker(flags: argparse.Namespace, suite: Suite, name: str, folder: Path, profile: bool = False) -> dict:
    """Run one trainer in a new process. Return its result.

    Raises:
        ConfigError: if the process fails.
    """
    words = [sys.executable, __file__, "--suite", flags.suite, "--worker", name, "--folder", str(folder)]
    words += ["--steps", str(suite.steps), "--rounds", "1", *(["--dry_run"] if flags.dry_run else [])]
    words += ["--cpu_time"] if flags.cpu_time else []
    words += ["--precision", suite.precision]
    words += ["--profile", flags.profile] if profile else []
    # Accelerate reads these variables, so that precision and device are the same for both trainers.
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": suite.precision}
    environment |= {"ACCELERATE_USE_CPU": "true"} if suite.device == "cpu" else {}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ConfigError(f"the benchmark of {name} failed:\n{done.stderr[-2000:]}")
    return json.loads((folder / "result.json").read_text())


@contextlib.contextmanager
def profiled(suite: Suite, path: str | None, name: str) -> Iterator[None]:
    """Profile the code of the with block. Append its most expensive operations to `path`."""
    if path is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    on_cuda = suite.device == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=kinds, acc_events=True) as profiler:
        yield
    key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    with Path(path).open("a") as file:
        file.write(f"\n{name}: two steps under the profiler, which slows small operations down\n")
        file.write(profiler.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=48) + "\n")


def run_ours(suite: Suite, folder: Path, _name: str) -> dict:
    """Run our trainer like launch/train.py, with completions of forced lengths.

    Returns:
        {"steps": [...], "memory_gib": ..., "shape": {...}}
    """
    from grpo.config.parser import load_config
    from grpo.rollout.engine import register_engine
    from grpo.rollout.native_engine import NativeEngine
    from grpo.run.build import build_run
    from grpo.runtime.signals import Signals
    from grpo.trainer import training_loop

    prompt_tokens: list[int] = []
    completions = suite.prompts_per_step * suite.num_generations

    @register_engine("forced")
    class Forced(NativeEngine):
        """Native engine that ends each completion at its forced length."""

        def generate(self, prompts: Any, plan: Any, *args: Any, **kwargs: Any) -> Any:
            self.lengths: list[int] = []
            if (
                len(prompts) * plan.num_generations == completions
            ):  # otherwise it is the check of the engine at the start
                self.lengths = forced_lengths(suite, len(prompt_tokens))
                prompt_tokens.append(sum(len(prompt.token_ids) for prompt in prompts))
            return super().generate(prompts, plan, *args, **kwargs)

        def end_of(self, row: Any, new_tokens: list[int]) -> int | None:
            if not self.lengths:
                return super().end_of(row, new_tokens)
            last = self.lengths[row.prompt * suite.num_generations + row.sample] - 1 - len(row.tokens)
            return last if last < len(new_tokens) else None

    with tempfile.TemporaryDirectory() as temporary:
        settings = {
            "model.name": folder / "model",
            "data.path": folder / "rows.jsonl",
            "data.system_prompt": "null",
            "data.max_prompt_length": 256,
            "run_dir": f"{temporary}/run",
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
        run = build_run(load_config([f"--{key}={value}" for key, value in settings.items()]))
        before = loaded_memory(suite.device)
        with Signals() as signals:
            training_loop(run, signals)
        memory = peak_memory(suite.device) - before
        run.close()
        rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
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
    linear = [m for m in run.policy.model.modules() if hasattr(m, "in_features")]
    head = run.policy.model.get_output_embeddings()
    shape = {
        "linear_weights": sum(module.weight.numel() for module in linear if module is not head),
        "head_weights": head.weight.numel(),
        "cache_numbers_per_position": run.engine.position_numbers,
    }
    return {"steps": steps, "memory_gib": memory, "shape": shape}


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
    from datasets import Dataset
    from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback

    from grpo.config.schema import DataConfig
    from grpo.data.rows import load_examples
    from grpo.data.stream import PromptStream
    from grpo.data.tokenizer import load_tokenizer
    from grpo.models.loading import load_model
    from grpo.rewards.registry import REWARDS as registered
    from grpo.runtime.device import cpu_threads
    from grpo.types import Prompt

    torch.set_num_threads(cpu_threads(1))
    clock: dict[str, float] = {}
    steps: list[dict[str, Any]] = []
    positions = [0, 0]  # without padding, with padding

    class Forced(LogitsProcessor):
        """Logits processor for forced lengths: the end token is impossible before, and certain at the end."""

        def __init__(self, prompt_width: int) -> None:
            self.lengths, self.width = forced_lengths(suite, len(steps)), prompt_width

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            drawn = input_ids.shape[1] - self.width
            scores[:, tokenizer.eos_token_id] = -torch.inf
            last = [row for row, length in enumerate(self.lengths) if length == drawn + 1]
            if last:
                scores[last] = -torch.inf
                scores[last, tokenizer.eos_token_id] = 0.0
            return scores

    class Timed(trl.GRPOTrainer):
        def _timed(self, phase: str, call: Any, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                clock[phase] = clock.get(phase, 0.0) + time.perf_counter() - started

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            return self._timed("rollout", super()._generate_single_turn, *args, **kwargs)

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            return self._timed("reward", super()._calculate_rewards, *args, **kwargs)

        def _get_per_token_logps_and_entropies(self, model: Any, ids: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            call = super()._get_per_token_logps_and_entropies
            if torch.is_grad_enabled():
                positions[0] += int(mask.sum())
                positions[1] += mask.numel()
                return call(model, ids, mask, *args, **kwargs)
            return self._timed("reference", call, model, ids, mask, *args, **kwargs)

    class Diagnostics(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.clear()
            positions[:] = [0, 0]
            clock["started"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            total = time.perf_counter() - clock.pop("started")
            phases = {phase: clock.get(phase, 0.0) for phase in ("rollout", "reward", "reference")}
            padding = 1 - positions[0] / positions[1]
            steps.append({"step": total, **phases, "update": total - sum(phases.values()), "padding_fraction": padding})

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict | None = None, **__: Any) -> None:
            if logs and "reward" in logs and steps:
                steps[-1]["mean_reward"] = logs["reward"]
                steps[-1]["tokens"] = logs["completions/mean_length"] * suite.prompts_per_step * suite.num_generations

    data = DataConfig(name="gsm8k", path=str(folder / "rows.jsonl"), system_prompt=None)
    examples = load_examples(data, "train", 0)
    stream = PromptStream([Prompt(i, e.messages, (), e.columns) for i, e in enumerate(examples)], seed=0)
    order = [p for step in range(suite.steps + 1) for p in stream.take(step, suite.prompts_per_step)]
    dataset = Dataset.from_list([{"prompt": p.messages, "answer": p.columns["answer"]} for p in order])
    completions = suite.prompts_per_step * suite.num_generations
    tuned = name == "trl_tuned"
    micro_batch = min(suite.trl_micro_batch if tuned else 8, completions)
    tokenizer = load_tokenizer(str(folder / "model"))
    with tempfile.TemporaryDirectory() as temporary:
        model = load_model(str(folder / "model"))  # float32 and without dropout, like ours
        generate = model.generate

        def forced(input_ids: Any, **kwargs: Any) -> Any:
            assert len(input_ids) == completions, "TRL samples all completions of a step in one call"
            return generate(input_ids, logits_processor=LogitsProcessorList([Forced(input_ids.shape[1])]), **kwargs)

        model.generate = forced
        config = trl.GRPOConfig(
            output_dir=temporary,
            max_steps=suite.steps + 1,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=completions // micro_batch,
            num_generations=suite.num_generations,
            max_completion_length=suite.max_completion_length,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            beta=0.04,
            temperature=1.0,
            bf16=suite.precision == "bf16",
            use_cpu=suite.device == "cpu",
            gradient_checkpointing=not tuned,
            disable_dropout=tuned,
            shuffle_dataset=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        trainer = Timed(
            model=model,
            args=config,
            train_dataset=dataset,
            reward_funcs=[registered.get(reward) for reward in REWARDS],
            processing_class=tokenizer,
            callbacks=[Diagnostics()],
        )
        before = loaded_memory(suite.device)
        trainer.train()
        memory = peak_memory(suite.device) - before
    return {"steps": steps[1:], "memory_gib": memory}


def loaded_memory(device: str) -> float:
    """Return the GiB in use (on CUDA, allocated by torch), and reset the peak."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory(device: str) -> float:
    """Return the peak in GiB since `loaded_memory`."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return _status("VmHWM")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 2**20
    raise ConfigError("the benchmark reads memory from /proc: run it on Linux")


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


def machine_rates(suite: Suite, one_thread: bool) -> dict[str, float]:
    """Measure this machine: a large matrix product in the suite's precision, and a copy of memory."""
    import torch

    if one_thread:
        torch.set_num_threads(1)
    clock = time.process_time if one_thread else time.perf_counter
    device = torch.device(suite.device)
    dtype = torch.bfloat16 if suite.precision == "bf16" else torch.float32
    size, words = (8192, 2**28) if suite.device == "cuda" else (1024, 2**24)
    left = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.zeros(words, device=device)
    target = torch.empty_like(source)

    def best(call: Any) -> float:
        seconds = []
        for _ in range(8):
            started = clock()
            call()
            if suite.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - started)
        return min(seconds)

    return {
        "matrix_gflops": 2 * size**3 / best(lambda: left @ left) / 1e9,
        "copy_gb_per_second": 8 * words / best(lambda: target.copy_(source)) / 1e9,
    }


def limits(suite: Suite, steps: list[dict], shape: dict, rates: dict[str, float]) -> dict[str, float]:
    """Return a lower limit of the seconds of each of our phases on this machine.

    It counts linear layers at the rate of the matrix product. In a decoding step of few rows, it counts reading
    weights, keys and values at the rate of the copy. Attention, norms and softmax are not counted, so no program
    reaches the limit.
    """
    size = 2 if suite.precision == "bf16" else 4
    flops, bandwidth = rates["matrix_gflops"] * 1e9, rates["copy_gb_per_second"] * 1e9
    body, head = shape["linear_weights"], shape["head_weights"]
    prompts = statistics.fmean(step["prompt_tokens"] for step in steps)
    lengths = forced_lengths(suite, 1)
    forward = (2 * body * (prompts + sum(lengths)) + 2 * head * sum(lengths)) / flops
    decode = 2 * body * prompts / flops
    for position in range(1, max(lengths)):
        active = sum(length > position for length in lengths)
        cached = active * (prompts / suite.prompts_per_step + position) * shape["cache_numbers_per_position"]
        decode += max(2 * (body + head) * active / flops, size * (body + head + cached) / bandwidth)
    return {"rollout": decode, "reference": forward, "update": 3 * forward}


def summarize(flags: argparse.Namespace, suite: Suite, runs: dict[str, list[dict]], rates: dict[str, float]) -> dict:
    """Return the report: medians and ranges over the measured steps of all rounds, and the ratios TRL / ours."""
    from importlib.metadata import version

    import torch

    def figures(results: list[dict]) -> dict:
        steps = [step for result in results for step in result["steps"]]
        made: dict[str, Any] = {}
        for key in [*PHASES, "padding_fraction"]:
            values = [step[key] for step in steps]
            made[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        made["tokens_per_second"] = sum(step["tokens"] for step in steps) / sum(step["step"] for step in steps)
        made["mean_length"] = sum(step["tokens"] for step in steps) / (
            len(steps) * suite.prompts_per_step * suite.num_generations
        )
        memory = [result["memory_gib"] for result in results]
        made["peak_memory_gib"] = {"median": statistics.median(memory), "min": min(memory), "max": max(memory)}
        made["reward_curve"] = [[round(step["mean_reward"], 4) for step in result["steps"]] for result in results]
        return made

    words = [word for word in sys.argv[1:] if word]
    report: dict[str, Any] = {
        "suite": flags.suite,
        "command": " ".join(
            ["python launch/benchmark.py", *(Path(w).name if w == flags.data_path else w for w in words)]
        ),
        "work": asdict(suite),
        "machine": {
            "processor": torch.cuda.get_device_name() if suite.device == "cuda" else _processor(),
            "cores": os.cpu_count(),
            **rates,
        },
        "versions": {package: version(package) for package in ("torch", "transformers", "accelerate", "trl")},
    }
    report["seconds"] = "of CPU time, one thread" if flags.cpu_time else "of wall-clock time"
    report["busy_processes"] = flags.busy
    if flags.dry_run:
        report["dry_run"] = "a narrow model on the CPU: shows that the path runs, says nothing of speed"
    report |= {runner: figures(results) for runner, results in runs.items()}
    ours = [step for result in runs["ours"] for step in result["steps"]]
    least = limits(suite, ours, runs["ours"][0]["shape"], rates)
    report["least_seconds"] = least
    report["times_the_least"] = {phase: report["ours"][phase]["median"] / least[phase] for phase in least}
    report["ratios"] = {}
    for kind in [kind for kind in ("default", "tuned") if f"trl_{kind}" in runs]:
        theirs, mine = report[f"trl_{kind}"], report["ours"]
        report["ratios"][kind] = {
            phase: theirs[phase]["median"] / mine[phase]["median"] for phase in ("step", "rollout", "update")
        } | {
            "peak_memory": theirs["peak_memory_gib"]["median"] / mine["peak_memory_gib"]["median"],
            "tokens_per_second": mine["tokens_per_second"] / theirs["tokens_per_second"],
        }
    return report


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def table(report: dict) -> str:
    """Return the report as a text table."""
    runners = [runner for runner in RUNNERS if runner in report]
    beside = f", beside {report['busy_processes']} busy processes" if report.get("busy_processes") else ""
    lines = [
        f"{report['suite']}: precision {report['work']['precision']}, seconds {report['seconds']}{beside}, "
        "median of the steps (min - max)",
        f"{'':22}" + "".join(f"{runner:>26}" for runner in runners),
    ]
    for phase in PHASES:
        cells = [report[runner][phase] for runner in runners]
        lines.append(
            f"{phase:22}" + "".join(f"{c['median']:10.3f} ({c['min']:.2f} - {c['max']:.2f})".rjust(26) for c in cells)
        )
    lines.append(
        f"{'padding fraction':22}" + "".join(f"{report[r]['padding_fraction']['median']:26.2f}" for r in runners)
    )
    lines.append(
        f"{'peak memory, GiB':22}" + "".join(f"{report[r]['peak_memory_gib']['median']:26.3f}" for r in runners)
    )
    for key in ("tokens_per_second", "mean_length"):
        lines.append(f"{key:22}" + "".join(f"{report[runner][key]:26.2f}" for runner in runners))
    for kind, ratios in report["ratios"].items():
        lines.append(f"TRL {kind} / ours:  " + "  ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    rates = report["machine"]
    lines.append(
        f"this machine: {rates['matrix_gflops']:.0f} GFLOP/s in a matrix product, "
        f"{rates['copy_gb_per_second']:.0f} GB/s of memory. Ours / the least that these allow:  "
        + "  ".join(f"{phase} {times:.2f}" for phase, times in report["times_the_least"].items())
    )
    if "dry_run" in report:
        lines.append(f"dry run: {report['dry_run']}")
    return "\n".join(lines)


def readme_table(reports: list[dict]) -> str:
    """Return a Markdown table with a row for each suite: ratios to TRL tuned and, in brackets, to TRL's defaults.

    A suite that was measured without TRL's defaults has no brackets.
    """
    lines = [
        "| suite | step | rollout | update | peak memory | completion tokens/s: ours, TRL tuned |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports:
        tuned, default = report["ratios"]["tuned"], report["ratios"].get("default", {})
        work = report["work"]
        completions, limit = work["num_generations"], work["max_completion_length"]
        name = f"`{report['suite']}`: {completions} completions of at most {limit} tokens"
        cells = [
            f"{tuned[key]:.1f}x" + (f" ({default[key]:.1f}x)" if key in default else "")
            for key in ("step", "rollout", "update", "peak_memory")
        ]
        speeds = f"{report['ours']['tokens_per_second']:.0f}, {report['trl_tuned']['tokens_per_second']:.0f}"
        lines.append(f"| {' | '.join([name, *cells, speeds])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
