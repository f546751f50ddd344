"""Ratios, limits of the machine, and the tables."""

import argparse
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from against_trl.suites import PHASES, RUNNERS, Suite, forced_lengths
from grpo.tracking.environment import processor_name


def limits(suite: Suite, steps: list[dict], shape: dict, rates: dict[str, float]) -> dict[str, float]:
    """Return a lower limit of the seconds of each of our phases on this machine.

    It counts linear layers at the rate of the matrix product. In a decoding step of few rows, it counts reading
    weights, keys and values at the rate of the copy. Attention, norms and softmax are not counted, so no program
    reaches the limit.
    """
    size = 2 if suite.precision == "bf16" else 4
    flops, bandwidth = rates["matrix_gflops"] * 1e9, rates["copy_gb_per_second"] * 1e9
    body, head = shape["linear_weights"], shape["head_weights"]
    prompts = statistics.fmean(step["prompt_tokens"] for step in steps)
    lengths = forced_lengths(suite, 1)
    forward = (2 * body * (prompts + sum(lengths)) + 2 * head * sum(lengths)) / flops
    decode = 2 * body * prompts / flops
    for position in range(1, max(lengths)):
        active = sum(length > position for length in lengths)
        cached = active * (prompts / suite.prompts_per_step + position) * shape["cache_numbers_per_position"]
        decode += max(2 * (body + head) * active / flops, size * (body + head + cached) / bandwidth)
    return {"rollout": decode, "reference": forward, "update": 3 * forward}


def summarize(flags: argparse.Namespace, suite: Suite, runs: dict[str, list[dict]], rates: dict[str, float]) -> dict:
    """Return the report: medians and ranges over the measured steps of all rounds, and the ratios TRL / ours."""
    from importlib.metadata import version

    import torch

    def figures(results: list[dict]) -> dict:
        steps = [step for result in results for step in result["steps"]]
        made: dict[str, Any] = {}
        for key in [*PHASES, "padding_fraction"]:
            values = [step[key] for step in steps]
            made[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        made["tokens_per_second"] = sum(step["tokens"] for step in steps) / sum(step["step"] for step in steps)
        made["mean_length"] = sum(step["tokens"] for step in steps) / (
            len(steps) * suite.prompts_per_step * suite.num_generations
        )
        memory = [result["memory_gib"] for result in results]
        made["peak_memory_gib"] = {"median": statistics.median(memory), "min": min(memory), "max": max(memory)}
        made["reward_curve"] = [[round(step["mean_reward"], 4) for step in result["steps"]] for result in results]
        return made

    words = [word for word in sys.argv[1:] if word]
    report: dict[str, Any] = {
        "suite": flags.suite,
        "command": " ".join(
            ["python launch/benchmark.py", *(Path(w).name if w == flags.data_path else w for w in words)]
        ),
        "work": asdict(suite),
        "machine": {
            "processor": torch.cuda.get_device_name() if suite.device == "cuda" else processor_name(),
            "cores": os.cpu_count(),
            **rates,
        },
        "versions": {package: version(package) for package in ("torch", "transformers", "accelerate", "trl")},
    }
    report["seconds"] = "of CPU time, one thread" if flags.cpu_time else "of wall-clock time"
    report["busy_processes"] = flags.busy
    if flags.dry_run:
        report["dry_run"] = "a narrow model on the CPU: shows that the path runs, says nothing of speed"
    report |= {runner: figures(results) for runner, results in runs.items()}
    ours = [step for result in runs["ours"] for step in result["steps"]]
    least = limits(suite, ours, runs["ours"][0]["shape"], rates)
    report["least_seconds"] = least
    report["times_the_least"] = {phase: report["ours"][phase]["median"] / least[phase] for phase in least}
    report["ratios"] = {}
    for kind in [kind for kind in ("default", "tuned") if f"trl_{kind}" in runs]:
        theirs, mine = report[f"trl_{kind}"], report["ours"]
        report["ratios"][kind] = {
            phase: theirs[phase]["median"] / mine[phase]["median"] for phase in ("step", "rollout", "update")
        } | {
            "peak_memory": theirs["peak_memory_gib"]["median"] / mine["peak_memory_gib"]["median"],
            "tokens_per_second": mine["tokens_per_second"] / theirs["tokens_per_second"],
        }
    return report


def table(report: dict) -> str:
    """Return the report as a text table."""
    runners = [runner for runner in RUNNERS if runner in report]
    beside = f", beside {report['busy_processes']} busy processes" if report.get("busy_processes") else ""
    lines = [
        f"{report['suite']}: precision {report['work']['precision']}, seconds {report['seconds']}{beside}, "
        "median of the steps (min - max)",
        f"{'':22}" + "".join(f"{runner:>26}" for runner in runners),
    ]
    for phase in PHASES:
        cells = [report[runner][phase] for runner in runners]
        lines.append(
            f"{phase:22}" + "".join(f"{c['median']:10.3f} ({c['min']:.2f} - {c['max']:.2f})".rjust(26) for c in cells)
        )
    lines.append(
        f"{'padding fraction':22}" + "".join(f"{report[r]['padding_fraction']['median']:26.2f}" for r in runners)
    )
    lines.append(
        f"{'peak memory, GiB':22}" + "".join(f"{report[r]['peak_memory_gib']['median']:26.3f}" for r in runners)
    )
    for key in ("tokens_per_second", "mean_length"):
        lines.append(f"{key:22}" + "".join(f"{report[runner][key]:26.2f}" for runner in runners))
    for kind, ratios in report["ratios"].items():
        lines.append(f"TRL {kind} / ours:  " + "  ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    rates = report["machine"]
    lines.append(
        f"this machine: {rates['matrix_gflops']:.0f} GFLOP/s in a matrix product, "
        f"{rates['copy_gb_per_second']:.0f} GB/s of memory. Ours / the least that these allow:  "
        + "  ".join(f"{phase} {times:.2f}" for phase, times in report["times_the_least"].items())
    )
    if "dry_run" in report:
        lines.append(f"dry run: {report['dry_run']}")
    return "\n".join(lines)


def readme_table(reports: list[dict]) -> str:
    """Return a Markdown table with a row for each suite: ratios to TRL tuned and, in brackets, to TRL's defaults.

    A suite that was measured without TRL's defaults has no brackets.
    """
    lines = [
        "| suite | step | rollout | update | peak memory | completion tokens/s: ours, TRL tuned |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports:
        tuned, default = report["ratios"]["tuned"], report["ratios"].get("default", {})
        work = report["work"]
        completions, limit = work["num_generations"], work["max_completion_length"]
        precision = {"no": "float32", "bf16": "bfloat16"}[work["precision"]]
        name = f"`{report['suite']}`: {completions} completions of at most {limit} tokens, {precision}"
        cells = [
            f"{tuned[key]:.1f}x" + (f" ({default[key]:.1f}x)" if key in default else "")
            for key in ("step", "rollout", "update", "peak_memory")
        ]
        speeds = f"{report['ours']['tokens_per_second']:.0f}, {report['trl_tuned']['tokens_per_second']:.0f}"
        lines.append(f"| {' | '.join([name, *cells, speeds])} |")
    return "\n".join(lines)
