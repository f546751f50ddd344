"""Run a grid of training runs: a table with intervals, a plot and one JSON in docs/results/.

    python benchmarks/experiments.py --grid launch/configs/experiments/starter_grid.yaml
                                     [--output docs/results] [--work outputs/grid]

Every variation runs once per seed. A finished run is not repeated, so the command can be interrupted and given again,
also on another machine: runs stored in the JSON in --output stay in it. The tables show the number of seeds.

The tiny model reaches full accuracy in the end, so the measure is the area under the curve of the training reward: its
mean over all steps. A seed also determines the model that its runs start from, so variations are compared seed by seed,
as the difference to the first one. Intervals are 95 % of Student's t over seeds.
"""

import json
import os
import statistics
from pathlib import Path
from typing import Any

import yaml
from shared import read_json, script_parser, write_json

from grpo.errors import ConfigError
from grpo.runtime.command import run_main

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Two-sided 95 % quantile of Student's t by number of seeds."""


def main() -> None:
    """Run the grid and write the report."""
    parser = script_parser(__doc__)
    parser.add_argument("--grid", required=True)
    parser.add_argument("--output", default="docs/results")
    parser.add_argument("--work", default="outputs/grid", help="the folder for the runs")
    parser.add_argument("--only-report", action="store_true", help="tables and plots of the finished runs")
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
    output = Path(flags.output)
    stored = output / f"{path.stem}.json"
    report = collect(grid, work, read_json(stored)["variations"] if stored.is_file() else {})
    report["command"] = f"python benchmarks/experiments.py --grid {flags.grid}"
    write_json(stored, report)
    (output / f"{path.stem}.md").write_text(table(report))
    plot(report, output / f"{path.stem}.png")
    print(table(report))


def folder_name(variation: str, seed: int) -> str:
    """Return the name of a run's folder."""
    return "".join(c if c.isalnum() else "_" for c in variation) + f"-seed{seed}"


def run_once(folder: Path, settings: dict[str, Any], seed: int) -> None:
    """Train once, unless the run is finished."""
    from grpo.config.parser import load_config
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


def collect(grid: dict[str, Any], work: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the report: every finished run's curve, and means over seeds.

    Args:
        grid: base, variations and seeds.
        work: The folder of the runs.
        stored: The variations of an earlier report, for runs that are not in `work`.
    """
    variations: dict[str, Any] = {}
    for name in grid["variations"]:
        runs = {}
        for seed in map(str, grid["seeds"]):
            folder = work / folder_name(name, int(seed))
            if (folder / "final").is_dir():
                lines = (folder / "metrics.jsonl").read_text().splitlines()
                runs[seed] = measured([json.loads(line) for line in lines])
            elif seed in stored.get(name, {}).get("runs", {}):
                runs[seed] = stored[name]["runs"][seed]
        if runs:
            keys = ("before", "after", "kl", "length", "seconds")
            means = {key: mean_and_interval([run[key] for run in runs.values()]) for key in keys}
            areas = {seed: statistics.mean(run["reward"]) for seed, run in runs.items()}
            first = next(iter(variations.values()))["areas"] if variations else areas
            pairs = [area - first[seed] for seed, area in areas.items() if seed in first]
            means["area"] = mean_and_interval(list(areas.values()))
            means["area_against_first"] = mean_and_interval(pairs)
            variations[name] = {"runs": runs, "seeds": len(runs), "areas": areas, **means}
    return {
        "base": grid["base"],
        "variations": variations,
        "not_run": [n for n in grid["variations"] if n not in variations],
    }


def measured(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one run's numbers from its metrics."""
    steps = [line for line in lines if "reward/mean" in line]
    return {
        "before": lines[0]["eval/accuracy"],
        "after": lines[-1]["eval/accuracy"],
        "reward": [round(line["reward/mean"], 4) for line in steps],
        "kl": steps[-1]["policy/kl"],
        "length": steps[-1]["rollout/length_mean"],
        "seconds": sum(line["time/step"] for line in steps),
    }


def mean_and_interval(values: list[float]) -> dict[str, float | None]:
    """Return the mean and the half-width of its 95 % interval; None for one value.

    # [0.2, 0.4, 0.3]: mean 0.3, half-width 4.303 * 0.1 / sqrt(3) = 0.248
    """
    half = None
    if len(values) > 1:
        half = T95.get(len(values), 1.96) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.mean(values), "half_width": half}


def table(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table."""

    def cell(value: dict[str, float | None], sign: str = "") -> str:
        half = "" if value["half_width"] is None else f" ± {value['half_width']:.3f}"
        return f"{value['mean']:{sign}.3f}{half}"

    first = next(iter(report["variations"]), "")
    lines = [
        f"`{report['command']}`",
        "",
        f"Area: mean training reward over all steps. Mean ± 95 % interval over seeds (Student's t); the difference to "
        f"`{first}` is taken seed by seed.",
        "",
        f"| variation | seeds | area | difference to {first} | held out before → after | KL at the end | tokens | "
        "seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["variations"].items():
        apart = "" if name == first else cell(row["area_against_first"], "+")
        lines.append(
            f"| {name} | {row['seeds']} | {cell(row['area'])} | {apart} | "
            f"{row['before']['mean']:.3f} → {row['after']['mean']:.3f} | "
            f"{row['kl']['mean']:.3f} | {row['length']['mean']:.1f} | {row['seconds']['mean']:.0f} |"
        )
    if report["not_run"]:
        lines += ["", f"In the grid, not run yet: {'; '.join(report['not_run'])}."]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the curves and the differences to the first variation."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("the plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 7.5))
    for index, (name, row) in enumerate(report["variations"].items()):
        curves = [run["reward"] for run in row["runs"].values()]
        means = [statistics.mean(step) for step in zip(*curves, strict=False)]
        left.plot(range(1, len(means) + 1), means, label=name, linestyle=("-", "--", ":")[index // 10 % 3])
    left.set(xlabel="step", ylabel="mean training reward (mean over seeds)")
    left.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))  # below, where it hides no curve
    names = list(report["variations"])
    rows = list(report["variations"].values())
    right.axvline(0, color="grey", linewidth=1)
    right.errorbar(
        [row["area_against_first"]["mean"] for row in rows],
        range(len(names)),
        xerr=[row["area_against_first"]["half_width"] or 0.0 for row in rows],
        fmt="o",
        capsize=3,
    )
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.grid(axis="x", alpha=0.3)
    right.set(xlabel=f"mean training reward over the run:\ndifference to {names[0]} seed by seed, 95 % interval")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_main(main)
