"""Coverage of `grpo check --probe`: forecasts of many short runs beside what then happened. A table and a JSON file.

    python benchmarks/forecast.py [--kinds starter smollm2] [--numbers 0 1 2] [--minutes 0.1]
                                  [--output docs/results/forecast.json] [--only-report]

Each run is forecast, then trained for five steps, in one process. Its seed and settings differ from those of the
others. What is in the file already is not measured again. SmolLM2 needs `python launch/fetch.py smollm2` before.
"""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from shared import RESULTS, ROOT, read_json, script_parser, write_json

from grpo.config.parser import load_config
from grpo.config.schema import Config
from grpo.data.rows import load_examples
from grpo.models.tiny import tiny_model_for
from grpo.runtime.command import run_main
from grpo.tools.forecast import HORIZON, forecast
from grpo.tools.replay import metrics_by_step, train_until
from grpo.tracking.environment import processor_name

QUANTITIES = {"seconds": "time/step", "flat": "reward/zero_std_fraction", "length": "rollout/length_mean"}
"""Field of a forecast step -> metric that it forecasts."""
MINUTES = {"starter": 0.1, "smollm2": 1.0}
STARTER_RUNS = 34
FIRST_SEED = 200
"""The widths that a forecast expects beforehand were chosen on runs with smaller seeds."""
SMALL = ["--eval_every=0", "--scoring.workers=0", "--tracking.report_to=[]", "--tracking.report=false"]


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(MINUTES), choices=list(MINUTES))
    parser.add_argument("--numbers", type=int, nargs="+", help="of the runs, from 0 (default: all)")
    parser.add_argument("--minutes", type=float, help="of each probe")
    parser.add_argument("--output", type=Path, default=RESULTS / "forecast.json")
    parser.add_argument("--only-report", action="store_true", help="the table of what the file holds")
    options = parser.parse_args()
    report = read_json(options.output) if options.output.is_file() else {"runs": []}
    if not options.only_report and "starter" in options.kinds:
        measured("starter", -1, settings("starter")[5], 0.02)  # the first run of a process is slower than the next ones
    for kind in [] if options.only_report else options.kinds:
        for number, flags in enumerate(settings(kind)):
            known = any((run["kind"], run["number"]) == (kind, number) for run in report["runs"])
            if known or (options.numbers is not None and number not in options.numbers):
                continue
            run = measured(kind, number, flags, options.minutes or MINUTES[kind])
            report |= {"command": "python benchmarks/forecast.py", "machine": machine()}
            report["runs"] = sorted([*report["runs"], run], key=lambda run: (run["kind"] != "starter", run["number"]))
            write_json(options.output, report)
            print(kind, number, *flags, {name: sum(covered(run, name)) for name in QUANTITIES}, flush=True)
    print(*table(report["runs"]), sep="\n")


def settings(kind: str) -> list[list[str]]:
    """Return the flags of each run."""
    if kind == "smollm2":
        config = f"--config={ROOT / 'launch' / 'configs' / 'smollm2_word_problems.yaml'}"
        rows = [(4, 6, 24, 1.0, 1e-5), (3, 8, 32, 1.0, 2e-5), (6, 4, 24, 0.7, 1e-5), (4, 4, 40, 1.2, 5e-6)]
        return [
            [
                config,
                f"--prompts_per_step={prompts}",
                f"--sampling.num_generations={size}",
                f"--sampling.max_completion_length={length}",
                f"--sampling.temperature={temperature}",
                f"--optimizer.learning_rate={rate}",
            ]
            for prompts, size, length, temperature, rate in rows
        ]
    varied = {
        "sampling.num_generations": [2, 3, 4, 6, 8, 16],
        "prompts_per_step": [2, 4, 8, 12, 16],
        "sampling.temperature": [0.4, 0.7, 1.0, 1.2],
        "sampling.max_completion_length": [12, 24, 48],
        "optimizer.learning_rate": [1e-5, 1e-4, 3e-4],
        "tokens_per_batch": [1024, 8192],
        "objective.beta": [0.0, 0.04],
    }
    steps = {"sampling.temperature": 2, "optimizer.learning_rate": 5, "objective.beta": 3}
    return [
        [f"--{key}={values[number // steps.get(key, 1) % len(values)]}" for key, values in varied.items()]
        for number in range(STARTER_RUNS)
    ]


def measured(kind: str, number: int, flags: list[str], minutes: float) -> dict[str, Any]:
    """Forecast a run, then train its first steps. Returns both, by quantity and step."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        config = dataclasses.replace(load_config([*flags, *SMALL, f"--run_dir={folder}"]), seed=FIRST_SEED + number)
        if kind == "starter":
            config.model.name = str(starter())
        found = forecast(config, minutes, 0.2)
        train_until(config, HORIZON)
        rows = metrics_by_step(folder)
    steps = {
        name: [
            {**dataclasses.asdict(getattr(step, name)), "happened": rows[step.step][metric]}
            for step in found.next_steps
        ]
        for name, metric in QUANTITIES.items()
    }
    size = {key: getattr(found, key) for key in ("groups", "trained_steps", "seconds_measured", "step_seconds")}
    return {"kind": kind, "number": number, "flags": flags[kind == "smollm2" :], **size, "steps": steps}


def starter() -> Path:
    """Return the folder of the tiny model of seed 0, which all runs start from."""
    config: Config = load_config([])
    return tiny_model_for(config, load_examples(config.data, "train", config.seed))


def machine() -> dict[str, Any]:
    """Return what the seconds depend on."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[1], 1),
    }


def covered(run: dict[str, Any], name: str) -> list[bool]:
    """Return for each step whether what happened lies in its interval. Ends count, up to rounding."""
    return [step["low"] - 1e-9 <= step["happened"] <= step["high"] + 1e-9 for step in run["steps"][name]]


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Return the coverage of each quantity, and the median width of its intervals."""
    lines = [
        "| runs | quantity | statements | covered | step 1 | step 5 | median width |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in [kind for kind in MINUTES if any(run["kind"] == kind for run in runs)]:
        chosen = [run for run in runs if run["kind"] == kind]
        everything: list[bool] = []
        for name in QUANTITIES:
            hits = [covered(run, name) for run in chosen]
            flat = [hit for row in hits for hit in row]
            everything += flat
            widths = sorted(width(step, name) for run in chosen for step in run["steps"][name])
            first, last = (f"{sum(row[at] for row in hits) / len(hits):.0%}" for at in (0, -1))
            wide = f"{widths[len(widths) // 2]:.0%}{'' if name == 'flat' else ' of the value'}"
            lines.append(f"| {len(chosen)} {kind} | {name} | {len(flat)} | {share(flat)} | {first} | {last} | {wide} |")
        lines.append(f"| {len(chosen)} {kind} | all | {len(everything)} | {share(everything)} | | | |")
    return lines


def width(step: dict[str, float], name: str) -> float:
    """Return the width of an interval: of the flat share in points, of the others relative to the value."""
    wide = step["high"] - step["low"]
    return wide if name == "flat" else wide / step["value"]


def share(hits: list[bool]) -> str:
    """Return "93.3 %"."""
    return f"{100 * sum(hits) / len(hits):.1f} %"


if __name__ == "__main__":
    run_main(main)
