"""Train SmolLM2 on the CPU with several seeds: a JSON, a table and a picture.

    python launch/fetch.py smollm2
    python benchmarks/smollm2.py [--task word_problems] [--seeds 0 1 2] [--precision bf16]
                                 [--work outputs/smollm2] [--output docs/results] [--only-report]

A run that has ended is not repeated, so that the command can be interrupted and given again. Runs in the JSON stay in
it. `arithmetic` starts from the model of `word_problems` with the same seed, which is trained first if it is missing.
Accuracy and flexible accuracy (the last number in any format) are greedy, on held-out questions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from shared import DOCS, RESULTS, ROOT, read_json, script_parser, write_json

from grpo.runtime.command import run_main

FIRST = {"arithmetic": "word_problems"}
"""Task -> the one whose trained model it starts from."""
PANELS = {"held-out accuracy": "accuracy", "flexible accuracy": "flexible", "mean reward of a step": "reward"}


def main() -> None:
    """Run the seeds that are missing, and write the report."""
    parser = script_parser(__doc__)
    parser.add_argument("--task", default="word_problems", choices=["word_problems", "arithmetic", "gsm8k"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "no"])
    parser.add_argument("--work", type=Path, default=Path("outputs/smollm2"), help="the folder for the runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only-report", action="store_true", help="table and picture of the runs there are")
    flags, more = parser.parse_known_args()
    stored = flags.output / f"smollm2_{flags.task}.json"
    report = read_json(stored) if stored.is_file() else {"runs": {}}
    for seed in flags.seeds:
        folder = flags.work / f"{flags.task}-seed{seed}"
        if not flags.only_report and not (folder / "final").is_dir():
            changes = list(more)
            if flags.task in FIRST:
                first = flags.work / f"{FIRST[flags.task]}-seed{seed}"
                if not (first / "final").is_dir():
                    train(FIRST[flags.task], seed, first, flags.precision, [])
                changes = ["--model.name", str(first / "final"), *more]
            train(flags.task, seed, folder, flags.precision, changes)
        if (folder / "metrics.jsonl").is_file():
            report["runs"][str(seed)] = measured(folder)
    report["command"] = f"python benchmarks/smollm2.py --task {flags.task}"
    write_json(stored, report)
    picture = DOCS / "images" / f"smollm2_{flags.task}.png"
    draw(report["runs"], picture)
    print(table(report["runs"]), stored, picture, sep="\n")


def train(task: str, seed: int, folder: Path, precision: str, more: list[str]) -> None:
    """Run launch/train.py with the config of the task. A later --key of `more` changes the config."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", precision, "--dynamo_backend", "no"]
    launcher += ["--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))]
    config = ROOT / "launch" / "configs" / f"smollm2_{task}.yaml"
    command = [*launcher, str(ROOT / "launch" / "train.py"), "--config", str(config), "--seed", str(seed)]
    subprocess.run([*command, "--run_dir", str(folder), *more], check=True)


def measured(folder: Path) -> dict[str, Any]:
    """Return the curves and facts of a run directory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluated = [line for line in lines if "eval/accuracy" in line]
    trained = [line for line in lines if "reward/mean" in line]
    keys = {"accuracy": "eval/accuracy", "flexible": "eval/accuracy_flexible", "format": "eval/format"}
    run: dict[str, Any] = {
        name: {str(line["step"]): round(line[key], 4) for line in evaluated} for name, key in keys.items()
    }
    run["reward"] = {str(line["step"]): round(line["reward/mean"], 4) for line in trained}
    run["length"] = {str(line["step"]): round(line["rollout/length_mean"], 1) for line in trained}
    run["training_seconds"] = round(sum(line["time/step"] for line in trained), 1)
    environment = read_json(folder / "environment.json")
    run["commit"] = environment.get("git_commit")
    run["threads"] = environment.get("torch_threads")
    run["platform"] = environment.get("platform")
    last = evaluated[-1]["step"]
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, step in (("before", evaluated[0]["step"]), ("after", last)):
        run[name] = [
            {key: row[key] for key in ("question", "completion", "answer")} for row in rows if row["step"] == step
        ][:3]
    return run


def table(runs: dict[str, Any]) -> str:
    """Return one row per seed, in Markdown."""
    lines = [
        "| seed | accuracy | flexible accuracy | format | tokens | steps | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed, run in sorted(runs.items()):
        ends = [_ends(run[name], "{:.0%}") for name in ("accuracy", "flexible", "format")]
        length = _ends(run["length"], "{:.0f}")
        lines.append(
            f"| {seed} | {' | '.join(ends)} | {length} | {len(run['reward'])} | {run['training_seconds']:.0f} |"
        )
    return "\n".join(lines)


def _ends(curve: dict[str, float], form: str) -> str:
    values = list(curve.values())
    return f"{form.format(values[0])} → {form.format(values[-1])}"


def draw(runs: dict[str, Any], path: Path) -> None:
    """Draw a panel for each of PANELS, with a line for each seed."""
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    for axes, (title, key) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for seed, run in sorted(runs.items()):
            steps, values = [int(step) for step in run[key]], list(run[key].values())
            axes.plot(steps, values, marker="o" if len(steps) < 12 else None, label=f"seed {seed}")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    run_main(main)
