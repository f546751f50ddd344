"""Measure the gain of overlapping scoring and reference with sampling, and of sampling ahead.

    python benchmarks/overlap.py [--output docs/results/overlap.json] [--rounds 3] [--milliseconds 5]

A model of the tiny model's shape with little training (so that completions are long), and a reward that judges
completions one by one in worker processes and takes --milliseconds for each. Three modes alternate: all in turn (the
overlaps are switched off by this script), overlapped (the trainer as it is), and sampled one step ahead
(rollout.max_staleness 1). Seconds of a step are medians over rounds and steps, without the first step of a run.
"""

import json
import os
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from shared import script_parser, write_json

from grpo.runtime.command import run_main

REWARD = """
import time
from grpo.rewards.registry import one_by_one

@one_by_one(5.0)
def unhurried(completions, **columns):
    time.sleep({seconds} * len(completions))
    return [0.0] * len(completions)
"""
PHASES = ("step", "rollout", "reward", "reference", "update")


def main() -> None:
    """Measure the three modes and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--output", help="write the JSON here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--milliseconds", type=float, default=5.0)
    options = parser.parse_args()
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in ("in turn", "overlapped", "one step ahead")}
    model = starter_shape()
    for _ in range(options.rounds):
        for name, found in seconds.items():
            for row in run(model, name, options.steps, options.milliseconds)[1:]:
                for phase in PHASES:
                    found.setdefault(phase, []).append(row[f"time/{phase}"])
    medians = {name: {phase: statistics.median(found[phase]) for phase in PHASES} for name, found in seconds.items()}
    print("| | " + " | ".join(PHASES) + " |")
    for name, phases in medians.items():
        print(f"| {name} | " + " | ".join(f"{phases[phase]:.3f} s" for phase in PHASES) + " |")
    if options.output:
        report = {
            "command": f"python benchmarks/overlap.py --rounds {options.rounds} --steps {options.steps} "
            "--output docs/results/overlap.json",
            "machine": {"cores": os.cpu_count(), "cuda": torch.cuda.is_available()},
            "versions": {package: version(package) for package in ("torch", "transformers")},
            "milliseconds": options.milliseconds,
            "median_seconds": medians,
        }
        write_json(options.output, report)


def starter_shape() -> Path:
    """Return the tiny model after one supervised step: made in seconds, then cached."""
    from grpo.models.tiny import Recipe, make_tiny_model

    return make_tiny_model(seed=0, recipe=Recipe(steps=1, problems=500))


def run(model: Path, name: str, steps: int, milliseconds: float) -> list[dict[str, Any]]:
    """Train once in the mode `name`. Return the metrics of each step."""
    from grpo.config.parser import load_config
    from grpo.rewards.workers import RewardWorkerPool
    from grpo.trainer import train

    with tempfile.TemporaryDirectory() as folder:
        reward = Path(folder) / "unhurried.py"
        reward.write_text(REWARD.format(seconds=milliseconds / 1000))
        settings = {
            "model.name": model,
            "data.name": "arithmetic",
            "data.system_prompt": "null",
            "data.max_prompt_length": 128,
            "sampling.num_generations": 16,
            "sampling.max_completion_length": 48,
            "run_dir": Path(folder) / "run",
            "steps": steps,
            "eval_every": 0,
            "rewards": json.dumps({"accuracy": 1.0, "xml_format": 0.2, f"{reward}:unhurried": 0.0}),
            "rollout.max_staleness": int(name == "one step ahead"),
            "tracking.report_to": "[]",
            "tracking.report": "false",
            "tracking.log_completions": "false",
        }
        config = load_config([f"--{key}={value}" for key, value in settings.items()])
        if name == "in turn":
            with (
                patch("grpo.experience.packed_before_rewards", lambda config: False),
                patch.object(RewardWorkerPool, "offer", lambda self, group: None),
            ):
                train(config)
        else:
            train(config)
        return [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    run_main(main)
