"""Train a tiny model to call a calculator, with several seeds; evaluate it with and without the tool; count prefills.

    python benchmarks/tools_learning.py [--seeds 0 1 2] [--work outputs/tools] [--only-report]

Each run is launch/configs/multiplication.yaml from the tiny model of seed 0. Then launch/evaluate.py runs twice: as
the run was, and with --tools '[]', which answers no call. Then the engine completes 64 held-out questions 4 times each,
keeping the keys and values of the first turn or computing the whole context again. A run that has ended is not
repeated. --only-report draws docs/images/tools_learning.png and prints the tables of docs/tools.md from
docs/results/tools_learning.json.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from shared import DOCS, RESULTS, ROOT, read_json, script_parser, write_json

from grpo.runtime.command import run_main

STORED = RESULTS / "tools_learning.json"
PICTURE = DOCS / "images" / "tools_learning.png"
CONFIG = ROOT / "launch" / "configs" / "multiplication.yaml"
QUESTIONS, SAMPLES = 64, 4


def main() -> None:
    """Run the seeds that are missing, and write the results and the picture."""
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("outputs/tools"), help="the folder for the runs")
    parser.add_argument("--only-report", action="store_true", help="draw the stored results")
    options = parser.parse_args()
    report = read_json(STORED) if STORED.exists() else {"runs": []}
    runs = {run["seed"]: run for run in report["runs"]}
    start = time.perf_counter()
    model = "" if options.only_report else tiny_model()
    report["warm_up_seconds"] = round(time.perf_counter() - start)
    for seed in [] if options.only_report else options.seeds:
        folder = options.work / f"seed{seed}"
        seconds = 0.0 if (folder / "final").is_dir() else train(seed, folder, model)
        runs[seed] = {"seed": seed, "seconds": round(seconds), **measured(folder), **without_tool(folder)}
        report |= {"command": "python benchmarks/tools_learning.py", "runs": [runs[each] for each in sorted(runs)]}
        report["prefilled"] = prefilled(options.work / f"seed{options.seeds[0]}")
        write_json(STORED, report)
    draw(report["runs"])
    print("\n".join(tables(report)), PICTURE, sep="\n")


def tiny_model() -> str:
    """Return the folder of the tiny model, which is made first where it is missing."""
    from grpo.data.multiplication import generate_products
    from grpo.models.tiny import TOOL_RECIPE, make_tiny_model

    rows = generate_products(TOOL_RECIPE.problems, seed=0, split="train")
    return str(make_tiny_model(seed=0, problems=rows, recipe=TOOL_RECIPE))


def train(seed: int, folder: Path, model: str) -> float:
    """Train, and return the seconds."""
    flags = ["--config", CONFIG, "--seed", seed, "--run_dir", folder, "--tracking.report_to", "[]"]
    flags += ["--model.name", model, "--tracking.report", "false"]
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "launch" / "train.py", *map(str, flags)], check=True)
    return time.perf_counter() - start


def measured(folder: Path) -> dict[str, Any]:
    """Return the curves of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    completions = 8 * 16
    return {
        "accuracy_by_step": {str(row["step"]): row["eval/accuracy"] for row in rows if "eval/accuracy" in row},
        "calls_by_step": {str(row["step"]): row["tools/calls"] / completions for row in rows if "tools/calls" in row},
        "failures": sum(row.get("tools/failures", 0) for row in rows),
        "largest_logprob_difference": max(row.get("policy/sampling_logprob_difference", 0) for row in rows),
        "training_seconds": round(sum(row.get("time/step", 0) for row in rows)),
    }


def without_tool(folder: Path) -> dict[str, float]:
    """Return the held-out accuracy of the trained model with the tool, and without."""
    found = {}
    for name, flags in (("with_tool", []), ("without_tool", ["--tools", "[]"])):
        output = folder / f"{name}.json"
        script = [sys.executable, str(ROOT / "launch" / "evaluate.py"), "--model", str(folder / "final")]
        subprocess.run([*script, "--output", str(output), *flags], check=True, stdout=subprocess.DEVNULL)
        found[name] = read_json(output)["metrics"]["eval/accuracy"]
    return found


def prefilled(folder: Path) -> dict[str, Any]:
    """Return the tokens that the engine computed outside of sampling, with and without the cache of earlier turns."""
    from grpo.data.multiplication import generate_products
    from grpo.data.rendering import prompt_token_ids
    from grpo.data.tokenizer import load_tokenizer
    from grpo.models.loading import load_model
    from grpo.models.logprob_model import use_grpo_attention
    from grpo.rollout.dialogue import Turns
    from grpo.rollout.engine import build_engine, end_token_ids
    from grpo.turns.calculator import calculator
    from grpo.turns.workers import TurnWorkers
    from grpo.types import Prompt, SamplingPlan

    path = str(folder / "final")
    tokenizer, model = load_tokenizer(path), load_model(path)
    packed = use_grpo_attention(model)
    rows = generate_products(QUESTIONS, seed=0, split="held_out")
    chats: list[Any] = [[{"role": "user", "content": row["question"]}] for row in rows]
    prompts = [Prompt(n, chat, tuple(prompt_token_ids(chat, tokenizer))) for n, chat in enumerate(chats)]
    found, ids = {}, {}
    for name, keep in (("kept", True), ("computed again", False)):
        settings = {"slots": 64, "uses_packed_attention": packed, "engine_kwargs": {"keep_turns": keep}}
        engine = build_engine("native", model, tokenizer, **settings)
        engine.turns = Turns(tokenizer, end_token_ids(model, tokenizer), TurnWorkers({"calculator": calculator}))
        groups = engine.generate(prompts, SamplingPlan(SAMPLES, 64, 1.0, seed=0))
        engine.turns.close()
        ids[name] = [one.token_ids for group in groups for one in group.completions]
        found[name] = engine.prefilled_tokens
    return {**found, "same completions": ids["kept"] == ids["computed again"], "completions": QUESTIONS * SAMPLES}


def tables(report: dict[str, Any]) -> list[str]:
    """Return the tables of docs/tools.md."""
    lines = [
        "| seed | held-out accuracy before | after | calls per completion, first and last step | after, without the "
        "tool | failed calls |",
        "|---|---|---|---|---|---|",
    ]
    for run in report["runs"]:
        accuracy, calls = list(run["accuracy_by_step"].values()), list(run["calls_by_step"].values())
        lines.append(
            f"| {run['seed']} | {100 * accuracy[0]:.1f} % | {100 * accuracy[-1]:.1f} % "
            f"| {calls[0]:.2f}, {calls[-1]:.2f} | {100 * run['without_tool']:.1f} % | {run['failures']:.0f} |"
        )
    counted = report["prefilled"]
    return [
        *lines,
        "",
        "| keys and values of the first turn | tokens of prompts and between turns that were computed |",
        "|---|---|",
        *(f"| {name} | {counted[name]:,} |" for name in ("kept", "computed again")),
        f"same completions: {counted['same completions']}",
    ]


def draw(runs: list[dict[str, Any]]) -> None:
    """Draw the accuracy and the calls per completion by step, a line for each seed."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    panels = {"held-out accuracy": "accuracy_by_step", "calls per completion": "calls_by_step"}
    for axes, (title, key) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for run in runs:
            axes.plot([int(step) for step in run[key]], list(run[key].values()), label=f"seed {run['seed']}")
        if key == "accuracy_by_step":
            last = [max(map(int, run[key])) for run in runs]
            axes.scatter(last, [run["without_tool"] for run in runs], marker="x", c="black", label="without the tool")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(-0.03, 1.05)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(PICTURE, dpi=90)


if __name__ == "__main__":
    run_main(main)
