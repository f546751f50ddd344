"""Train SmolLM2 on word problems with this trainer and with TRL 1.16, one after the other: a JSON and a picture.

    pip install -e ".[benchmark]" && python launch/fetch.py smollm2
    python benchmarks/smollm2_trl.py [--steps 12] [--precision bf16] [--output docs/results] [--only-report]

Both start from the same weights and get the same prompts in the same order, rewards, group size, lengths, loss,
learning rate and precision (launch/configs/smollm2_word_problems.yaml). Each samples with its own random numbers, so
that the curves agree only within the noise of a step's mean reward, which the picture shows as a band of one standard
error. Seconds are wall-clock time of whole steps, without evaluations. The first step of each is shown, too.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from against_trl.measuring import loaded_memory, peak_memory
from matplotlib.figure import Figure
from shared import DOCS, RESULTS, ROOT, read_json, script_parser, write_json

from grpo.errors import ConfigError
from grpo.runtime.command import run_main

CONFIG = ROOT / "launch" / "configs" / "smollm2_word_problems.yaml"
PICTURE = DOCS / "images" / "smollm2_trl.png"
NAMES = {"ours": "this trainer", "trl": "TRL 1.16"}


def main() -> None:
    """Run both trainers in processes of their own, and write the report."""
    parser = script_parser(__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "no"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only-report", action="store_true", help="draw the picture of the stored results")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    stored = flags.output / "smollm2_trl.json"
    if flags.worker:
        run = {"ours": train_ours, "trl": train_with_trl}[flags.worker]
        stored.write_text(json.dumps(run(flags.steps, flags.precision)))
        return
    if not flags.only_report:
        with tempfile.TemporaryDirectory() as folder:
            report = {name: worker(name, flags, Path(folder)) for name in NAMES}
        command = f"python benchmarks/smollm2_trl.py --steps {flags.steps} --precision {flags.precision}"
        write_json(stored, report | {"command": command, "cores": os.cpu_count()})
    report = read_json(stored)
    draw(report)
    print(table(report), stored, PICTURE, sep="\n")


def worker(name: str, flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the result of one trainer, run in a new process."""
    words = [sys.executable, __file__, "--worker", name, "--steps", str(flags.steps), "--output", str(folder)]
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": flags.precision, "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*words, "--precision", flags.precision], check=True, env=environment, cwd=ROOT)
    return read_json(folder / "smollm2_trl.json")


def configured(steps: int, run_dir: str) -> Any:
    """Return the config of the word problems, without evaluations."""
    from grpo.config.parser import load_config

    changes = {"steps": steps, "eval_every": 0, "run_dir": run_dir, "tracking.report_to": "[]"}
    return load_config(["--config", str(CONFIG), *(f"--{key}={value}" for key, value in changes.items())])


def train_ours(steps: int, _precision: str) -> dict[str, Any]:
    """Return the rewards and seconds of each step, and the peak memory, of this trainer."""
    from grpo.run.build import build_run
    from grpo.runtime.signals import Signals
    from grpo.trainer import training_loop

    with tempfile.TemporaryDirectory() as folder:
        run = build_run(configured(steps, f"{folder}/run"))
        before = loaded_memory("cpu")
        with Signals() as signals:
            training_loop(run, signals)
        memory = peak_memory("cpu") - before
        run.close()
        rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
        completions = [json.loads(line) for line in (run.run_dir / "rollouts.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "reward/mean" in row]
    rewards: dict[int, list[float]] = {}
    for line in completions:
        rewards.setdefault(line["step"], []).append(line["reward"])
    return {
        "reward": [row["reward/mean"] for row in rows],
        "error": [standard_error(rewards[row["step"]]) for row in rows],
        "length": [row["rollout/length_mean"] for row in rows],
        "seconds": [row["time/step"] for row in rows],
        "memory_gib": memory,
    }


def train_with_trl(steps: int, precision: str) -> dict[str, Any]:
    """Return the same of TRL's GRPOTrainer, tuned as in launch/benchmark.py."""
    try:
        import trl
    except ImportError as error:
        raise ConfigError('the comparison needs TRL: pip install -e ".[benchmark]"') from error
    import torch
    from transformers import TrainerCallback

    from grpo.data.tokenizer import load_tokenizer
    from grpo.models.loading import load_model
    from grpo.rewards.registry import REWARDS
    from grpo.runtime.device import cpu_threads

    torch.set_num_threads(cpu_threads(1))
    curves: dict[str, Any] = {"reward": [], "error": [], "length": [], "seconds": []}
    scores: list[float] = []

    class Recorder(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            scores.clear()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            curves["seconds"].append(time.perf_counter() - self.started)
            curves["error"].append(standard_error(scores))

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict | None = None, **__: Any) -> None:
            if logs and "reward" in logs:
                curves["reward"].append(logs["reward"])
                curves["length"].append(logs["completions/mean_length"])

    with tempfile.TemporaryDirectory() as folder:
        config = configured(steps, f"{folder}/run")

        def total(**columns: Any) -> list[float]:
            """Return the weighted sum, so that its standard error can be computed."""
            parts = [(weight, REWARDS.get(name)(**columns)) for name, weight in config.rewards.items()]
            made = [sum(weight * values[i] for weight, values in parts) for i in range(len(parts[0][1]))]
            scores.extend(made)
            return made

        model = load_model(config.model.name, config.model)
        trainer = trl.GRPOTrainer(
            model=model,
            args=trl.GRPOConfig(**arguments(config, folder, precision)),
            train_dataset=prompts(config),
            reward_funcs=[total],
            processing_class=load_tokenizer(config.model.name, config.model.gguf_file),
            callbacks=[Recorder()],
        )
        before = loaded_memory("cpu")
        trainer.train()
        return curves | {"memory_gib": peak_memory("cpu") - before}


def prompts(config: Any) -> Any:
    """Return the prompts of all steps in the order in which our trainer takes them."""
    from datasets import Dataset

    from grpo.data.rows import load_examples
    from grpo.data.stream import PromptStream
    from grpo.types import Prompt

    examples = load_examples(config.data, "train", config.seed)
    stream = PromptStream([Prompt(i, e.messages, (), e.columns) for i, e in enumerate(examples)], seed=config.seed)
    order = [prompt for step in range(config.steps) for prompt in stream.take(step, config.prompts_per_step)]
    return Dataset.from_list([{"prompt": prompt.messages, "answer": prompt.columns["answer"]} for prompt in order])


def arguments(config: Any, folder: str, precision: str) -> dict[str, Any]:
    """Return the arguments of GRPOConfig: the values of our config, no checkpointing, and micro-batches of a group."""
    completions = config.prompts_per_step * config.sampling.num_generations
    return {
        "output_dir": folder,
        "max_steps": config.steps,
        "per_device_train_batch_size": config.sampling.num_generations,
        "gradient_accumulation_steps": completions // config.sampling.num_generations,
        "num_generations": config.sampling.num_generations,
        "max_completion_length": config.sampling.max_completion_length,
        "temperature": config.sampling.temperature,
        "learning_rate": config.optimizer.learning_rate,
        "lr_scheduler_type": config.optimizer.lr_scheduler_type,
        "adam_beta2": config.optimizer.adam_beta2,
        "weight_decay": config.optimizer.weight_decay,
        "max_grad_norm": config.optimizer.max_grad_norm,
        "beta": config.objective.beta,
        "loss_type": config.objective.loss_type,
        "scale_rewards": config.objective.scale_rewards,
        "bf16": precision == "bf16",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": config.seed,
    }


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def table(report: dict[str, Any]) -> str:
    """Return a row for each trainer, in Markdown."""
    lines = [
        "| | mean reward, first and last three steps | tokens | seconds per step | peak memory |",
        "|---|---|---|---|---|",
    ]
    for key, name in NAMES.items():
        run = report[key]
        first, last = statistics.fmean(run["reward"][:3]), statistics.fmean(run["reward"][-3:])
        seconds = statistics.median(run["seconds"])
        length = statistics.fmean(run["length"])
        lines.append(
            f"| {name} | {first:.2f}, {last:.2f} | {length:.0f} | {seconds:.1f} | {run['memory_gib']:.2f} GiB |"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any]) -> None:
    """Draw the rewards over the steps and over the seconds."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for key, name in NAMES.items():
        run = report[key]
        seconds = [sum(run["seconds"][: step + 1]) for step in range(len(run["seconds"]))]
        low = [mean - error for mean, error in zip(run["reward"], run["error"], strict=True)]
        high = [mean + error for mean, error in zip(run["reward"], run["error"], strict=True)]
        for axes, place in ((by_step, range(1, len(seconds) + 1)), (by_time, seconds)):
            axes.plot(place, run["reward"], marker=".", label=name)
            axes.fill_between(place, low, high, alpha=0.2)
    by_step.set(xlabel="step", ylabel="mean reward of a step")
    by_time.set(xlabel="seconds of training")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=90)


if __name__ == "__main__":
    run_main(main)
