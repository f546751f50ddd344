"""Variance of the difference between a run and its fork, with common random numbers and with independent ones.

    python benchmarks/fork_variance.py [--seeds 16] [--work outputs/fork_variance]
                                       [--output docs/results/fork_variance.json] [--only-report]

One run of the tiny model is continued from its checkpoint of step 3, with each seed as it is and with one change (`grpo
fork --set seed=S KEY=VALUE`). A seed determines the prompts and the random numbers of the completions.

    common         change(S) - as it is(S)      both with the prompts and random numbers of S
    independent    change(S) - as it is(S')     variance: that of the changed runs plus that of the others

What the work folder holds already is not measured again.
"""

import random
import statistics
from pathlib import Path
from typing import Any

from shared import RESULTS, read_json, script_parser, write_json

from grpo.config.parser import load_config
from grpo.data.rows import load_examples
from grpo.models.tiny import tiny_model_for
from grpo.runtime.command import run_main
from grpo.tools.fork import fork
from grpo.tools.replay import metrics_by_step, train_until

START, STEPS = 3, 3
CHANGES = ["optimizer.learning_rate=2e-4", "objective.beta=0.0", "sampling.temperature=0.9"]
"""The defaults are 1e-4, 0.04 and 1."""
METRICS = ["reward/mean", "rollout/length_mean"]
SMALL = ["--eval_every=0", f"--save_every={START}", "--scoring.workers=0", "--tracking.report_to=[]"]
RESAMPLES = 2000


def main() -> None:
    """Continue what is missing, and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("outputs/fork_variance"), help="the folder for the runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "fork_variance.json")
    parser.add_argument("--only-report", action="store_true", help="the table of what the file holds")
    options = parser.parse_args()
    if not options.only_report:
        write_json(options.output, measure(options.work, options.seeds))
    print(*table(read_json(options.output)), sep="\n")


def measure(work: Path, seeds: int) -> dict[str, Any]:
    """Return the metrics of all continuations: by change ("" for none), one list of steps for each seed."""
    run = work / "run"
    if not (run / "checkpoints" / f"step-{START}").is_dir():
        start = load_config([])
        model = tiny_model_for(start, load_examples(start.data, "train", start.seed))
        config = load_config([*SMALL, "--tracking.report=false", f"--run_dir={run}"])
        config.model.name = str(model)
        train_until(config, START)
    runs: dict[str, list[list[dict[str, float]]]] = {}
    for seed in range(1, seeds + 1):
        for change in ("", *CHANGES):
            output = work / f"{change.partition('=')[0] or 'same'}-{seed}"
            if START + STEPS not in metrics_by_step(output):
                fork(run, START, [f"seed={seed}", *filter(None, [change])], output, START + STEPS)
                print(output, flush=True)
            rows = metrics_by_step(output)
            after = range(START + 1, START + STEPS + 1)
            runs.setdefault(change, []).append([{name: rows[step][name] for name in METRICS} for step in after])
    return {"command": "python benchmarks/fork_variance.py", "seeds": seeds, "runs": runs}


def table(report: dict[str, Any]) -> list[str]:
    """Return the variances of the differences and their ratio, by change, metric and step."""
    lines = [
        "| change | metric | step of the fork | mean difference | variance, common | independent | ratio [90 %] |",
        "|---|---|---|---|---|---|---|",
    ]
    for change, name in ((change, name) for change in CHANGES for name in METRICS):
        for step in range(STEPS):
            old, new = ([steps[step][name] for steps in report["runs"][key]] for key in ("", change))
            if old == new:  # the first step is sampled before the change can act
                continue
            common, independent = variances(old, new)
            low, high = interval(old, new)
            difference = statistics.fmean(new) - statistics.fmean(old)
            lines.append(
                f"| `{change}` | {name} | {step + 1} | {difference:.2g} | {common:.2g} | {independent:.2g} | "
                f"{independent / common:.1f} [{low:.1f}, {high:.1f}] |"
            )
    return lines


def variances(old: list[float], new: list[float]) -> tuple[float, float]:
    """Return the variance of new(S) - old(S), and that of new(S) - old(S') with independent seeds S and S'."""
    paired = [after - before for before, after in zip(old, new, strict=True)]
    return statistics.variance(paired), statistics.variance(old) + statistics.variance(new)


def interval(old: list[float], new: list[float]) -> tuple[float, float]:
    """Return the 5 % and 95 % quantiles of the ratio of the variances, by a bootstrap over seeds."""
    rng, ratios = random.Random(0), []
    for _ in range(RESAMPLES):
        picked = rng.choices(range(len(old)), k=len(old))
        common, independent = variances([old[i] for i in picked], [new[i] for i in picked])
        ratios.append(independent / common if common else float("inf"))
    ratios.sort()
    return ratios[RESAMPLES // 20], ratios[-RESAMPLES // 20]


if __name__ == "__main__":
    run_main(main)
