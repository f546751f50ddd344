"""Benchmark: this trainer and TRL at the same work, alternating in separate processes -> one table and one JSON.

python launch/benchmark.py --suite cpu-tiny [--output FILE.json]
python launch/benchmark.py --suite cpu-gsm8k --data.path train.jsonl [--output FILE.json]

Both get the same model folder, the same prompts in the same order, the same reward functions, group size, lengths, optimizer
and float32. TRL runs twice: as it comes (micro-batches of 8, gradient checkpointing on), and tuned (checkpointing off,
steps_per_generation equal to accumulation, so that no old-logprob pass runs). Ratios are TRL divided by ours: larger is
better for us. Needs: pip install -e ".[benchmark]"
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grpo.errors import ConfigError, run_main

REWARDS = ["xmlcount", "soft_format", "strict_format", "int", "correctness"]
PHASES = ["step", "rollout", "reward", "reference", "update"]


@dataclass(frozen=True)
class Suite:
    """One size of work."""

    prompts_per_step: int
    num_generations: int
    max_completion_length: int
    steps: int
    """Measured steps of each run; one more is done first, and not counted."""
    rounds: int
    hidden_size: int
    layers: int
    vocabulary: int
    gsm8k: bool
    """Prompts from a GSM8K file (--data.path), else generated arithmetic."""
    warm_up_steps: int = 60


SUITES = {
    "cpu-tiny": Suite(4, 8, 64, steps=4, rounds=2, hidden_size=128, layers=4, vocabulary=600, gsm8k=False),
    "cpu-gsm8k": Suite(4, 8, 128, steps=3, rounds=2, hidden_size=256, layers=6, vocabulary=8192, gsm8k=True),
    "cpu-gsm8k-long": Suite(4, 16, 200, steps=2, rounds=2, hidden_size=256, layers=6, vocabulary=8192, gsm8k=True),
}
RUNNERS = ["ours", "trl_default", "trl_tuned"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--data.path", dest="data_path", help="GSM8K training rows (JSONL), for the gsm8k suites")
    parser.add_argument("--output", help="write the JSON here")
    parser.add_argument("--steps", type=int, help="measured steps of each run, instead of the suite's")
    parser.add_argument("--rounds", type=int, help="runs of each trainer, instead of the suite's")
    parser.add_argument("--worker", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    suite = SUITES[flags.suite]
    suite = replace(suite, steps=flags.steps or suite.steps, rounds=flags.rounds or suite.rounds)
    if flags.worker:
        work = run_ours if flags.worker == "ours" else run_trl
        result = work(suite, Path(flags.folder), flags.worker)
        (Path(flags.folder) / "result.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_work(suite, folder, flags.data_path)
        runs: dict[str, list[dict]] = {name: [] for name in RUNNERS}
        for number in range(suite.rounds):
            for name in RUNNERS:
                print(f"round {number + 1} of {suite.rounds}: {name}", file=sys.stderr, flush=True)
                runs[name].append(worker(flags, name, folder))
    report = summarize(flags.suite, suite, runs)
    print(table(report))
    if flags.output:
        Path(flags.output).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.output).write_text(json.dumps(report, indent=1) + "\n")


def make_work(suite: Suite, folder: Path, data_path: str | None) -> None:
    """The model and the prompts that both get: model/ and rows.jsonl."""
    from grpo.data.arithmetic import generate_problems
    from grpo.starter import GSM8K_RECIPE, Recipe, make_starter

    if suite.gsm8k and not data_path:
        raise ConfigError("this suite needs GSM8K rows: add --data.path train.jsonl")
    rows: list[dict] = (
        [json.loads(line) for line in Path(data_path).read_text(encoding="utf-8").splitlines() if line.strip()]
        if suite.gsm8k and data_path
        else list(generate_problems(2000, seed=0, split="train"))
    )
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
    model = make_starter(seed=0, problems=rows, recipe=recipe, report=lambda text: print(text, file=sys.stderr))
    (folder / "model").symlink_to(model)
    needed = suite.prompts_per_step * (suite.steps + 1)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[: max(needed, 64)]))


def worker(flags: argparse.Namespace, name: str, folder: Path) -> dict:
    words = [sys.executable, __file__, "--suite", flags.suite, "--worker", name, "--folder", str(folder)]
    for key in ("steps", "rounds"):
        if getattr(flags, key):
            words += [f"--{key}", str(getattr(flags, key))]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"the benchmark of {name} failed:\n{done.stderr[-2000:]}")
    return json.loads((folder / "result.json").read_text())


def run_ours(suite: Suite, folder: Path, _name: str) -> dict:
    """Our trainer, as launch/train.py runs it; -> {"steps": [...], "memory_gib": ...}"""
    from grpo.config import load_config
    from grpo.setup import prepare
    from grpo.signals import Signals
    from grpo.trainer import loop

    with tempfile.TemporaryDirectory() as temporary:
        settings = {
            "model.name": folder / "model",
            "data.path": folder / "rows.jsonl",
            "data.system_prompt": "null",
            "run_dir": f"{temporary}/run",
            "steps": suite.steps + 1,
            "prompts_per_step": suite.prompts_per_step,
            "sampling.num_generations": suite.num_generations,
            "sampling.max_completion_length": suite.max_completion_length,
            "optimizer.learning_rate": 1e-5,
            "optimizer.lr_scheduler_type": "constant",
            "tokens_per_batch": 1024,
            "eval_every": 0,
            "tracking.report_to": "[]",
            "tracking.log_completions": "false",
            "rewards": json.dumps(dict.fromkeys(REWARDS, 1.0)),
        }
        run = prepare(load_config([f"--{key}={value}" for key, value in settings.items()]))
        before = loaded_memory()
        with Signals() as signals:
            loop(run, signals)
        memory = peak_memory() - before
        run.close()
        rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    completions = suite.prompts_per_step * suite.num_generations
    steps = [
        {phase: row[f"time/{phase}"] for phase in PHASES}
        | {
            "tokens": row["rollout/length_mean"] * completions,
            "mean_reward": row["reward/mean"],
            "padding_fraction": 0.0,
        }
        for row in rows
        if row["step"] > 1
    ]
    return {"steps": steps, "memory_gib": memory}


def run_trl(suite: Suite, folder: Path, name: str) -> dict:
    """TRL's GRPOTrainer with a clock around its phases."""
    try:
        import trl
    except ImportError as error:
        raise ConfigError('the benchmark compares with TRL: pip install -e ".[benchmark]"') from error
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from grpo.config import DataConfig
    from grpo.data import load_examples
    from grpo.data.stream import PromptStream
    from grpo.distributed import cpu_threads
    from grpo.policy import load_model, load_tokenizer
    from grpo.rewards import REWARDS as registered
    from grpo.types import Prompt

    torch.set_num_threads(cpu_threads(1))
    clock: dict[str, float] = {}
    steps: list[dict[str, Any]] = []
    positions = [0, 0]  # real, all

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

    class Watch(TrainerCallback):
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
    with tempfile.TemporaryDirectory() as temporary:
        model = load_model(str(folder / "model"))  # float32 and without dropout, as ours
        config = trl.GRPOConfig(
            output_dir=temporary,
            max_steps=suite.steps + 1,
            per_device_train_batch_size=min(8, completions),
            gradient_accumulation_steps=completions // min(8, completions),
            num_generations=suite.num_generations,
            max_completion_length=suite.max_completion_length,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            beta=0.04,
            temperature=1.0,
            bf16=False,
            use_cpu=True,
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
            processing_class=load_tokenizer(str(folder / "model")),
            callbacks=[Watch()],
        )
        before = loaded_memory()
        trainer.train()
        memory = peak_memory() - before
    return {"steps": steps[1:], "memory_gib": memory}


def loaded_memory() -> float:
    """GiB resident now, with the model loaded; the peak is counted from here on."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory() -> float:
    return _status("VmHWM")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 2**20
    raise ConfigError("the benchmark reads memory from /proc: run it on Linux")


def summarize(name: str, suite: Suite, runs: dict[str, list[dict]]) -> dict:
    """Medians and ranges over all measured steps of all rounds, and TRL / ours."""
    from importlib.metadata import version

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
        made["peak_memory_gib"] = statistics.median(result["memory_gib"] for result in results)
        made["reward_curve"] = [[round(step["mean_reward"], 4) for step in result["steps"]] for result in results]
        return made

    report: dict[str, Any] = {
        "suite": name,
        "work": asdict(suite),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {package: version(package) for package in ("torch", "transformers", "accelerate", "trl")},
    }
    report |= {runner: figures(results) for runner, results in runs.items()}
    report["ratios"] = {}
    for kind in ("default", "tuned"):
        theirs, ours = report[f"trl_{kind}"], report["ours"]
        report["ratios"][kind] = {
            phase: theirs[phase]["median"] / ours[phase]["median"] for phase in ("step", "rollout", "update")
        } | {
            "peak_memory": theirs["peak_memory_gib"] / ours["peak_memory_gib"],
            # Lengths are sampled, so runs may differ in them: the same ratio per completion token.
            "tokens_per_second": ours["tokens_per_second"] / theirs["tokens_per_second"],
        }
    return report


def table(report: dict) -> str:
    lines = [
        f"{report['suite']}: seconds, median of the steps (min - max)",
        f"{'':22}" + "".join(f"{runner:>26}" for runner in RUNNERS),
    ]
    for phase in PHASES:
        cells = [report[runner][phase] for runner in RUNNERS]
        lines.append(
            f"{phase:22}" + "".join(f"{c['median']:10.3f} ({c['min']:.2f} - {c['max']:.2f})".rjust(26) for c in cells)
        )
    for key in ("tokens_per_second", "mean_length", "peak_memory_gib"):
        lines.append(f"{key:22}" + "".join(f"{report[runner][key]:26.2f}" for runner in RUNNERS))
    for kind, ratios in report["ratios"].items():
        lines.append(f"TRL {kind} / ours:  " + "  ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
