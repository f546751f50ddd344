"""Experiments: a grid of training runs -> a table with intervals, a plot and one JSON in docs/results/.

python launch/experiments.py --grid launch/configs/experiments/starter_grid.yaml [--output docs/results] [--work outputs/grid]

Seed by seed, every variation once; a run that is there already is not repeated, so the command can be broken off and given
again, and the tables show how many seeds they rest on. With `start_seed`, all runs start from one and the same starter, so
that a seed changes prompts and samples only, and variations of one seed can be compared in pairs.

A starter gets everything right sooner or later, so the measure is how soon: `area`, the mean over all steps of the share of
right training completions (what a run earned with its budget), and the completions it took until 90 % of a step's were
right. Intervals are 95 % of Student's t over seeds.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import yaml

from grpo.errors import ConfigError, run_main

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Two-sided 95 % quantile of Student's t, by number of seeds."""
ENOUGH = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", required=True)
    parser.add_argument("--output", default="docs/results")
    parser.add_argument("--work", default="outputs/grid", help="where the runs are written")
    parser.add_argument("--only-report", action="store_true", help="tables and plots from the runs that are there")
    parser.add_argument("--seeds", type=int, nargs="+", help="run only these seeds of the grid")
    flags = parser.parse_args()
    path = Path(flags.grid)
    if not path.is_file():
        raise ConfigError(f"--grid: there is no file {path}")
    grid = yaml.safe_load(path.read_text())
    work = Path(flags.work) / path.stem
    if not flags.only_report:
        base = same_start(grid["base"], grid["start_seed"]) if "start_seed" in grid else grid["base"]
        for seed in flags.seeds or grid["seeds"]:
            for name, changes in grid["variations"].items():
                run_once(work / folder_name(name, seed), base | changes, seed)
    report = collect(grid, work)
    report["command"] = f"python launch/experiments.py --grid {flags.grid}"
    output = Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{path.stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / f"{path.stem}.md").write_text(table(report))
    plot(report, output / f"{path.stem}.png")
    print(table(report))


def same_start(base: dict[str, Any], seed: int) -> dict[str, Any]:
    """`base` with the starter of this seed as the model of every run, and what the starter's preset says besides."""
    from grpo.config import PRESETS, flatten
    from grpo.starter import make_starter

    preset = flatten(yaml.safe_load((PRESETS / "starter.yaml").read_text()))
    rewards = preset.pop("rewards")
    return preset | {"rewards": json.dumps(rewards)} | base | {"model.name": str(make_starter(seed=seed, report=print))}


def folder_name(variation: str, seed: int) -> str:
    return "".join(c if c.isalnum() else "_" for c in variation) + f"-seed{seed}"


def run_once(folder: Path, settings: dict[str, Any], seed: int) -> None:
    """One training run, unless it is finished already."""
    from grpo.config import load_config
    from grpo.trainer import train

    if (folder / "final").is_dir():
        return
    flags = settings | {
        "seed": seed,
        "run_dir": folder,
        "tracking.report_to": "[]",
        "tracking.log_completions": "false",
        "resume": "auto",
    }
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    begun = time.process_time()
    train(load_config([f"--{key}={'null' if value is None else value}" for key, value in flags.items()]))
    (folder / "cpu_seconds.json").write_text(json.dumps(time.process_time() - begun) + "\n")


def collect(grid: dict[str, Any], work: Path) -> dict[str, Any]:
    """Every finished run's curve, and means over seeds."""
    variations: dict[str, Any] = {}
    for name in grid["variations"]:
        runs = {}
        for seed in grid["seeds"]:
            folder = work / folder_name(name, seed)
            if (folder / "final").is_dir():
                lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
                runs[seed] = measured(lines, rollouts) | {
                    "cpu_seconds": json.loads((folder / "cpu_seconds.json").read_text())
                }
        if runs:
            keys = ("before", "after", "area", "kl", "length", "cpu_seconds")
            means = {key: mean_and_interval([run[key] for run in runs.values()]) for key in keys}
            first = next(iter(variations.values()), {"runs": runs})["runs"]
            pairs = [run["area"] - first[seed]["area"] for seed, run in runs.items() if seed in first]
            against_first = {"area_against_first": mean_and_interval(pairs)} if variations else {}
            variations[name] = {"runs": runs, "seeds": len(runs), **means, **against_first}
    return {"base": grid["base"], "start_seed": grid.get("start_seed"), "variations": variations}


def measured(lines: list[dict[str, Any]], rollouts: list[dict[str, Any]]) -> dict[str, Any]:
    """One run's numbers from its metrics and its completions."""
    steps = [line for line in lines if "reward/accuracy/mean" in line]
    curve = [round(line["reward/accuracy/mean"], 4) for line in steps]
    enough = next((step + 1 for step, right in enumerate(curve) if right >= ENOUGH), None)
    return {
        "before": lines[0]["eval/accuracy"],
        "after": lines[-1]["eval/accuracy"],
        "curve": curve,
        "area": statistics.mean(curve),
        "completions": len(rollouts),
        "completions_to_90": None if enough is None else sum(row["step"] <= enough for row in rollouts),
        "kl": steps[-1]["policy/kl"],
        "length": steps[-1]["rollout/length_mean"],
    }


def mean_and_interval(values: list[float]) -> dict[str, float | None]:
    """# [0.2, 0.4, 0.3]: mean 0.3, half-width 4.303 * 0.1 / sqrt(3) = 0.248; null for one value"""
    half = None
    if len(values) > 1:
        half = T95.get(len(values), 1.96) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.mean(values), "half_width": half}


def table(report: dict[str, Any]) -> str:
    def cell(value: dict[str, float | None], sign: str = "") -> str:
        half = "" if value["half_width"] is None else f" ± {value['half_width']:.3f}"
        return f"{value['mean']:{sign}.3f}{half}"

    first = next(iter(report["variations"]), "")
    lines = [
        f"`{report['command']}`",
        "",
        f"Area: share of right completions over the whole run. Mean ± 95 % interval over seeds (Student's t); the difference to "
        f"`{first}` is taken seed by seed. Completions to 90 %: each seed's; – = never.",
        "",
        f"| variation | seeds | area | difference to {first} | completions to 90 % | held out before → after | KL | tokens | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["variations"].items():
        soon = " / ".join(str(run["completions_to_90"] or "–") for run in row["runs"].values())
        apart = cell(row["area_against_first"], "+") if "area_against_first" in row else ""
        lines.append(
            f"| {name} | {row['seeds']} | {cell(row['area'])} | {apart} | {soon} | {row['before']['mean']:.3f} → "
            f"{row['after']['mean']:.3f} | {row['kl']['mean']:.3f} | {row['length']['mean']:.1f} | {row['cpu_seconds']['mean']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("the plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6))
    for index, (name, row) in enumerate(report["variations"].items()):
        curves = [run["curve"] for run in row["runs"].values()]
        means = [statistics.mean(step) for step in zip(*curves, strict=False)]
        left.plot(range(1, len(means) + 1), means, label=name, linestyle=("-", "--", ":")[index // 10 % 3])
    left.set(xlabel="step", ylabel="share of right training completions (mean over seeds)", ylim=(0, 1))
    left.legend(fontsize=7)
    names = list(report["variations"])
    rows = list(report["variations"].values())
    right.errorbar(
        [row["area"]["mean"] for row in rows],
        range(len(names)),
        xerr=[row["area"]["half_width"] or 0.0 for row in rows],
        fmt="o",
        capsize=3,
    )
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.grid(axis="x", alpha=0.3)
    right.set(xlabel="area: share of right completions over the run, 95 % interval over seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_main(main)
