"""Experiments: a grid of training runs -> a table with intervals, a plot and one JSON in docs/results/.

python launch/experiments.py --grid launch/configs/experiments/starter_grid.yaml [--output docs/results] [--work outputs/grid]

Seed by seed, every variation once; a run that is there already is not repeated, so the command can be broken off and given
again, and the tables show how many seeds they rest on. The interval is 95 % of Student's t over seeds.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import yaml

from grpo.errors import ConfigError, run_main

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Two-sided 95 % quantile of Student's t, by number of seeds."""


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
        for seed in flags.seeds or grid["seeds"]:
            for name, changes in grid["variations"].items():
                run_once(work / folder_name(name, seed), grid["base"] | changes, seed)
    report = collect(grid, work)
    report["command"] = f"python launch/experiments.py --grid {flags.grid}"
    output = Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{path.stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / f"{path.stem}.md").write_text(table(report))
    plot(report, output / f"{path.stem}.png")
    print(table(report))


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
    train(load_config([f"--{key}={value}" for key, value in flags.items()]))


def collect(grid: dict[str, Any], work: Path) -> dict[str, Any]:
    """Every finished run's curve, and means over seeds."""
    variations = {}
    for name in grid["variations"]:
        runs = {}
        for seed in grid["seeds"]:
            folder = work / folder_name(name, seed)
            if (folder / "final").is_dir():
                lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                runs[seed] = {
                    "before": lines[0]["eval/accuracy"],
                    "after": lines[-1]["eval/accuracy"],
                    "reward": [round(line["reward/mean"], 4) for line in lines if "reward/mean" in line],
                    "kl": lines[-1]["policy/kl"],
                    "length": lines[-1]["rollout/length_mean"],
                    "seconds": sum(line.get("time/step", 0.0) for line in lines),
                }
        if runs:
            keys = ("before", "after", "kl", "length", "seconds")
            means = {key: mean_and_interval([run[key] for run in runs.values()]) for key in keys}
            gain = mean_and_interval([run["after"] - run["before"] for run in runs.values()])
            variations[name] = {"runs": runs, "seeds": len(runs), "gain": gain, **means}
    return {"base": grid["base"], "variations": variations}


def mean_and_interval(values: list[float]) -> dict[str, float | None]:
    """# [0.2, 0.4, 0.3]: mean 0.3, half-width 4.303 * 0.1 / sqrt(3) = 0.248; null for one value"""
    half = None
    if len(values) > 1:
        half = T95.get(len(values), 1.96) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.mean(values), "half_width": half}


def table(report: dict[str, Any]) -> str:
    def cell(value: dict[str, float | None], digits: int = 3) -> str:
        half = "" if value["half_width"] is None else f" ± {value['half_width']:.{digits}f}"
        return f"{value['mean']:.{digits}f}{half}"

    lines = [
        f"`{report['command']}`",
        "",
        "Held-out accuracy before and after, mean ± 95 % interval over seeds (Student's t).",
        "",
        "| variation | seeds | before | after | gain | KL at the end | tokens | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["variations"].items():
        lines.append(
            f"| {name} | {row['seeds']} | {cell(row['before'])} | {cell(row['after'])} | {cell(row['gain'])} | "
            f"{cell(row['kl'])} | {row['length']['mean']:.1f} | {row['seconds']['mean']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("the plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for name, row in report["variations"].items():
        curves = [run["reward"] for run in row["runs"].values()]
        left.plot(
            range(1, len(curves[0]) + 1), [statistics.mean(step) for step in zip(*curves, strict=True)], label=name
        )
    left.set(xlabel="step", ylabel="mean training reward (mean over seeds)")
    left.legend(fontsize=7)
    names = list(report["variations"])
    rows = list(report["variations"].values())
    right.barh(names, [row["gain"]["mean"] for row in rows], xerr=[row["gain"]["half_width"] or 0.0 for row in rows])
    right.invert_yaxis()
    right.set(xlabel="gain in held-out accuracy, 95 % interval over seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_main(main)
