"""Run README's first command with several seeds, and draw README's first picture from the results.

    python benchmarks/starter_seeds.py [--seeds 0 1 2 3 4] [--work outputs/starter_seeds] [--only-report]

A run that has ended is not repeated, and runs in docs/results/starter_seeds.json stay in it. --only-report draws the
picture and prints the table of the stored results.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from shared import DOCS, RESULTS, ROOT, read_json, script_parser, write_json

from grpo.runtime.command import run_main

PANELS = {"held-out accuracy": "accuracy_by_step", "tokens of an answer": "length_by_step"}
STORED = RESULTS / "starter_seeds.json"
PICTURE = DOCS / "images" / "starter_seeds.png"


def main() -> None:
    """Run the seeds that are missing; write the results and docs/images/starter_seeds.png."""
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--work", type=Path, default=Path("outputs/starter_seeds"), help="the folder for the runs")
    parser.add_argument("--only-report", action="store_true", help="draw the stored results")
    options = parser.parse_args()
    report = read_json(STORED)
    runs = {run["seed"]: run for run in report["runs"]}
    for seed in [] if options.only_report else options.seeds:
        folder = options.work / f"seed{seed}"
        if not (folder / "final").is_dir():
            train(seed, folder)
        runs[seed] = measured(folder, seed)
        report |= {"command": "the first command of README with --seed SEED", "versions": versions(folder)}
        report["runs"] = [runs[each] for each in sorted(runs)]
        write_json(STORED, report)
    draw(report["runs"], PICTURE, digest(STORED))
    print("\n".join(table(report["runs"])), PICTURE, sep="\n")


def train(seed: int, folder: Path) -> None:
    """Run the first command of README."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    launcher += ["--config_file", str(ROOT / "accelerate_configs" / "one_process.yaml")]
    command = [*launcher, str(ROOT / "launch" / "train.py"), "--seed", str(seed), "--run_dir", str(folder)]
    subprocess.run(command, check=True)


def measured(folder: Path, seed: int) -> dict[str, Any]:
    """Return the curves of a run, and the first held-out question that only the trained model answers right."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if "eval/accuracy" in row]
    answers = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    before, after = ({row["draw"]: row for row in answers if row["step"] == held_out[at]["step"]} for at in (0, -1))
    shown = next(draw for draw in before if not before[draw]["accuracy"] and after[draw]["accuracy"])
    return {
        "seed": seed,
        "accuracy_by_step": {str(row["step"]): row["eval/accuracy"] for row in held_out},
        "length_by_step": {str(row["step"]): row["eval/length_mean"] for row in held_out},
        "format_before": held_out[0]["eval/format"],
        "format_after": held_out[-1]["eval/format"],
        "example": {
            "question": before[shown]["question"],
            "before": before[shown]["completion"],
            "after": after[shown]["completion"],
        },
    }


def versions(folder: Path) -> dict[str, str]:
    """Return the versions of torch and transformers that a run recorded."""
    found = read_json(folder / "environment.json")["versions"]
    return {name: found[name] for name in ("torch", "transformers")}


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Return the table of docs/quickstart.md."""
    lines = [
        "| seed | before | after 10 steps | after 30 steps | completion length |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        accuracy, length = run["accuracy_by_step"], run["length_by_step"]
        shares = " | ".join(f"{100 * accuracy[step]:.1f} %" for step in ("0", "10", "30"))
        lines.append(f"| {run['seed']} | {shares} | {length['0']:.0f} → {length['30']:.0f} tokens |")
    return lines


def remark(runs: list[dict[str, Any]]) -> str:
    """Return a sentence about the runs that were not repeated with the present tiny model; "" if there are none."""
    older = [str(run["seed"]) for run in runs if run.get("first_version")]
    if not older:
        return ""
    return (
        f"Seeds {', '.join(older)} were not run again: they are of the first version, whose tiny model had one "
        "embedding less."
    )


def digest(path: Path) -> str:
    """Return the SHA-256 of the results, which the picture holds as its description."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def results_of(picture: Path) -> str:
    """Return the SHA-256 of the results that a picture was drawn from."""
    with Image.open(picture) as image:
        return str(image.info.get("Description", ""))


def draw(runs: list[dict[str, Any]], path: Path, results: str) -> None:
    """Draw accuracy and length of held-out answers by step, a line for each seed."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, (title, key) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for run in runs:
            steps, values = [int(step) for step in run[key]], list(run[key].values())
            axes.plot(steps, values, marker="o", label=f"seed {run['seed']}")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=90, metadata={"Description": results})


if __name__ == "__main__":
    run_main(main)
