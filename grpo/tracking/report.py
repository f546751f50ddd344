"""Report: a run directory -> report.md and PNG curves in it.

Sections: held-out evaluation, curves, findings, parts of the reward, length against correctness, times, and the best
and worst completions. It only reads files, so it works on any run.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.errors import ConfigError, StorageError
from grpo.rewards.registry import reward_labels
from grpo.runtime.messages import visible
from grpo.runtime.statistics import mcnemar, mean_interval, wilson_interval
from grpo.tracking.curves import CURVES, keys_of, short_name
from grpo.tracking.metrics import is_interval, with_interval
from grpo.tracking.rollout_reader import Row, is_correct, judge, last_step, rows_of_step, whole_completion
from grpo.tracking.run_reader import MetricsFile, RunFolder, thin

EXAMPLES = 2
_LONGEST = 1200
_ROLLOUT_STEPS = 5
"""First and last steps of the run whose completions are read."""


def write_report(run_dir: Path) -> Path:
    """Write report.md, report_curves.png and, if the run has completions, report_lengths.png.

    Returns:
        The path of report.md.

    Raises:
        ConfigError: for a folder that is not a run directory.
        StorageError: if a file cannot be written.
    """
    run = RunFolder(run_dir)
    if not run.metrics.refresh() or not run.metrics.steps:
        raise ConfigError(f"--run {run_dir} holds no metrics.jsonl with a step in it: give the folder of a run")
    first, last = _rollouts(run)
    try:
        draw_curves(run.metrics, run_dir / "report_curves.png")
        if first or last:
            draw_lengths(first, last, run_dir / "report_lengths.png")
        path = run_dir / "report.md"
        path.write_text(_text(run, first, last), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write the report into {run_dir}: {error}") from error
    return path


def attribution(metrics: MetricsFile, weights: dict[str, float]) -> list[tuple[str, float, float, float]]:
    """Return each reward's part of the change of the total reward.

    Returns:
        (name, early mean, late mean, part) for each reward. Early and late are the first and the last tenth of the
        steps. A part is weight x change, so the parts add up to the change of the weighted sum.
    """
    rows = []
    labels = reward_labels(weights)
    for name, weight in weights.items():
        key = f"reward/{labels[name]}/mean"
        name = labels[name] if key in metrics.columns else name  # older runs have the whole name
        values = metrics.series(f"reward/{name}/mean")[1]
        if values:
            tenth = max(1, len(values) // 10)
            early, late = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
            rows.append((name, early, late, weight * (late - early)))
    return rows


def length_buckets(
    rows: list[Row], value: Callable[[Row], float | None] = is_correct, buckets: int = 5
) -> list[tuple[int, int, list[float]]]:
    """Divide completions by length into up to `buckets` parts of about equal count.

    Completions of one length are in one part. Those without a value are left out.

    Returns:
        (shortest, longest, values) for each part.
    """
    lengths: dict[int, list[float]] = {}
    for row in rows:
        found = value(row)
        if found is not None:
            lengths.setdefault(int(row["length"]), []).append(float(found))
    wanted = sum(map(len, lengths.values())) / buckets
    parts: list[tuple[int, int, list[float]]] = []
    shortest: int | None = None
    values: list[float] = []
    for length in sorted(lengths):
        shortest, values = length if shortest is None else shortest, [*values, *lengths[length]]
        if len(values) >= wanted or length == max(lengths):
            parts.append((shortest, length, values))
            shortest, values = None, []
    return parts


def draw_curves(metrics: MetricsFile, path: Path) -> None:
    """Draw every curve that has values into one PNG file."""
    from matplotlib.figure import Figure

    panels = [(curve.title, keys_of(curve, metrics)) for curve in CURVES]
    panels = [(title, keys) for title, keys in panels if any(metrics.series(key)[0] for key in keys)]
    lines = (len(panels) + 2) // 3
    figure = Figure(figsize=(12, 2.7 * lines))
    for index, (title, keys) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, 3, index)
        for key in keys:
            steps, values = thin(*metrics.series(key), points=500)
            label = _plain_label(key) if len(keys) > 1 else None
            axes.plot(steps, values, marker="o" if len(steps) < 12 else None, markersize=3, label=label)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize=7)
        axes.tick_params(labelsize=7)
    # Fixed margins: matplotlib's automatic layouts would draw everything twice.
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.12 / lines, top=1 - 0.16 / lines, hspace=0.35, wspace=0.18)
    figure.savefig(path, dpi=80)


def draw_lengths(first: list[Row], last: list[Row], path: Path) -> None:
    """Draw histograms of completion lengths of the first and last steps, right and wrong ones in different colors.

    Where no reward tells right from wrong, the colors are those of high and low rewards.
    """
    from matplotlib.figure import Figure

    judged = judge([*first, *last])
    verdicts = iter(judged.verdicts)
    figure = Figure(figsize=(9, 2.8))
    longest = max((int(row["length"]) for row in [*first, *last]), default=1)
    for index, (title, rows) in enumerate((("first steps", first), ("last steps", last)), start=1):
        axes = figure.add_subplot(1, 2, index)
        parts = dict(zip((*judged.labels, "not judged"), (True, False, None), strict=True))
        of_rows = [(int(row["length"]), next(verdicts)) for row in rows]
        shown = {name: [length for length, found in of_rows if found is value] for name, value in parts.items()}
        shown = {name: lengths for name, lengths in shown.items() if lengths}
        if shown:
            axes.hist(list(shown.values()), bins=20, range=(0, longest), stacked=True, label=list(shown))
            axes.legend(fontsize=8)
        axes.set_title(f"{title}: completions by length in tokens", fontsize=10)
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.1, top=0.9)
    figure.savefig(path, dpi=80)


def _plain_label(key: str) -> str:
    """Escape a key for matplotlib, where a dollar sign starts a formula."""
    return visible(short_name(key)).replace("$", r"\$")


def _rollouts(run: RunFolder) -> tuple[list[Row], list[Row]]:
    """Return the completions of the first and of the last steps, which never overlap."""
    path = run.path / "rollouts.jsonl"
    last = last_step(path)
    if last is None:
        return [], []
    count = min(_ROLLOUT_STEPS, max(1, last // 2))
    first_rows = [row for step in range(1, count + 1) for row in rows_of_step(path, step)]
    last_rows = (
        [row for step in range(last - count + 1, last + 1) for row in rows_of_step(path, step)] if last > 1 else []
    )
    return first_rows, last_rows


def _text(run: RunFolder, first: list[Row], last: list[Row]) -> str:
    metrics, config = run.metrics, run.config()
    steps = max(metrics.steps)
    lines = [f"# {_inline(run.name)}", ""]
    model, data = config.get("model", {}), config.get("data", {})
    lines.append(
        f"{steps} steps of GRPO on {_inline(data.get('path') or data.get('name') or '?')}, from "
        f"{_inline(model.get('name', '?'))}; seed {config.get('seed', '?')}. The numbers are in `metrics.jsonl`, the "
        f"settings in `config.yaml`, versions and machine in `environment.json`."
    )
    lines += ["", *_before_and_after(metrics), *_paired_lines(run), "", "![curves](report_curves.png)", ""]
    lines += _finding_lines(run.findings())
    weights = {str(name): float(weight) for name, weight in (config.get("rewards") or {}).items()}
    lines += _attribution_lines(metrics, weights)
    if first or last:
        lines += _length_lines(first, last)
    lines += _time_lines(metrics)
    lines += _example_lines(last or first)
    return "\n".join(lines).rstrip() + "\n"


def _before_and_after(metrics: MetricsFile) -> list[str]:
    rows = []
    for key in metrics.columns:
        if not key.startswith("eval/") or is_interval(key):
            continue
        steps, values = metrics.series(key)
        before, after = (with_interval(_at(metrics, steps[index]), key) for index in (0, -1))
        change = values[-1] - values[0] if len(values) > 1 else 0.0
        rows.append([_code(key), f"{before} (step {steps[0]})", f"{after} (step {steps[-1]})", f"{change:+.3f}"])
    if not rows:
        return ["## Before and after", "", "There was no held-out evaluation (`eval_every` 0, or no held-out data)."]
    note = ["", "In brackets: 95 % intervals (Wilson's for shares)."] if any(map(is_interval, metrics.columns)) else []
    return ["## Before and after", "", *_table(["held out", "before", "after", "change"], rows), *note]


def _at(metrics: MetricsFile, step: int) -> dict[str, float]:
    """Return the values of an evaluation."""
    found = {key: dict(zip(*metrics.series(key), strict=True)) for key in metrics.columns if key.startswith("eval/")}
    return {key: values[step] for key, values in found.items() if step in values}


def _finding_lines(found: list[Row]) -> list[str]:
    """Return the section with the findings of the diagnostics (grpo/tracking/diagnostics.py)."""
    items = [f"- Step {row['step']}: {_inline(row['text'])}: {_inline(row['mend'])}." for row in found]
    return ["## What may keep it from learning", "", *items, ""] if items else []


def paired_items(run: RunFolder) -> tuple[int, int, int, int, int] | None:
    """Compare the first and the last evaluation item by item.

    Returns:
        (first step, last step, items, items right only at the first, items right only at the last); None if the run
        does not have two evaluations of the same items.
    """
    path = run.path / "evaluations.jsonl"
    steps, _ = run.metrics.series("eval/accuracy")
    if len(steps) < 2:
        return None
    first, last = (
        {row["draw"]: row["accuracy"] > 0 for row in rows_of_step(path, step)} for step in (steps[0], steps[-1])
    )
    if not first or first.keys() != last.keys():
        return None
    lost = sum(first[item] and not last[item] for item in first)
    gained = sum(last[item] and not first[item] for item in first)
    return steps[0], steps[-1], len(first), lost, gained


def _paired_lines(run: RunFolder) -> list[str]:
    found = paired_items(run)
    if found is None:
        return []
    before, after, items, lost, gained = found
    p = mcnemar(lost, gained)
    if p >= 0.05:
        verdict = "no change is established"
    else:
        verdict = "the gain is established" if gained > lost else "the loss is established"
    return [
        "",
        f"Paired, the same {items} items at step {before} and at step {after}: {gained} gained, {lost} lost; "
        f"McNemar's exact test p = {p:.2g}, so {verdict} (p < 0.05). Item by item: `evaluations.jsonl`.",
    ]


def _attribution_lines(metrics: MetricsFile, weights: dict[str, float]) -> list[str]:
    found = attribution(metrics, weights)
    if not found:
        return []
    shown = weights | {label: weights[name] for name, label in reward_labels(weights).items()}
    total = sum(part for *_, part in found)
    rows = [
        [_code(name), f"{shown[name]:g}", f"{early:.3f}", f"{late:.3f}", f"{part:+.3f}"]
        for name, early, late, part in found
    ]
    rows.append(["all", "", "", "", f"{total:+.3f}"])
    heading = ["reward", "weight", "first tenth", "last tenth", "part of the change"]
    return ["## Where the reward came from", "", *_table(heading, rows), ""]


def _length_lines(first: list[Row], last: list[Row]) -> list[str]:
    """Return the section with the accuracy by length; with the reward where no reward tells right from wrong."""
    rewards = not any(is_correct(row) is not None for row in [*first, *last])
    rows = []
    for when, part in (("first steps", first), ("last steps", last)):
        for shortest, longest, values in length_buckets(part, _reward_of if rewards else is_correct):
            mean = sum(values) / len(values)
            low, high = mean_interval(values) if rewards else wilson_interval(round(sum(values)), len(values))
            span = f"{low:.3f} to {high:.3f}" if 0 < high - low < math.inf else ""
            rows.append([when, f"{shortest} to {longest}", f"{len(values)}", f"{mean:.3f}", span])
    what = "reward" if rewards else "right"
    title = f"## Length against {'reward' if rewards else 'correctness'}"
    return [
        *(title, "", "![lengths](report_lengths.png)", ""),
        *_table(["", "tokens", "completions", what, "95 % interval"], rows),
        "",
    ]


def _reward_of(row: Row) -> float | None:
    reward = row.get("reward")
    return float(reward) if isinstance(reward, (int, float)) else None


def _time_lines(metrics: MetricsFile) -> list[str]:
    phases = {key: metrics.series(key)[1] for key in sorted(metrics.columns) if key.startswith("time/")}
    if "time/step" not in phases:
        return []
    whole = sum(phases["time/step"])
    rows = [
        [_code(key), f"{sum(values):.1f} s", f"{sum(values) / whole:.0%}", f"{sorted(values)[len(values) // 2]:.3f} s"]
        for key, values in phases.items()
    ]
    return ["## Time", "", *_table(["phase", "total", "share", "median step"], rows), ""]


def _example_lines(rows: list[Row]) -> list[str]:
    scored = sorted((row for row in rows if isinstance(row.get("reward"), (int, float))), key=lambda row: row["reward"])
    if not scored:
        return []
    lines = []
    for title, ordered in (("Best completions", scored[::-1]), ("Worst completions", scored)):
        of_each_prompt = {row.get("prompt"): row for row in reversed(ordered)}  # the first of each prompt
        chosen = sorted(of_each_prompt.values(), key=ordered.index)[:EXAMPLES]
        lines += [f"## {title}", ""]
        for row in chosen:
            rewards = ", ".join(f"{name} {value}" for name, value in (row.get("rewards") or {}).items())
            answer = (row.get("columns") or {}).get("answer")
            lines += [
                f"Step {row['step']}, reward {row['reward']:.3f} ({_inline(rewards)}), gold answer {_inline(answer)}:",
                "",
                *fenced(f"{row.get('prompt', '')}\n---\n{whole_completion(row)}"),
                "",
            ]
    return lines


def _table(heading: list[str], rows: list[list[str]]) -> list[str]:
    cells = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]


def fenced(text: str) -> list[str]:
    """Return a text as a Markdown code block, with a fence longer than any run of backticks in the text."""
    text = visible(text if len(text) <= _LONGEST else text[:_LONGEST] + "...")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + "text", text, fence]


def _code(name: str) -> str:
    """Format a name as code in a table cell."""
    return "`" + re.sub(r"[`|\n]", " ", visible(name)) + "`"


def _inline(value: Any) -> str:
    """Escape Markdown and HTML in a text, and shorten it to one line."""
    text = visible(str(value)).replace("\n", " ")[:200]
    return re.sub(r"([\\`*_{}\[\]<>|#!$~&])", r"\\\1", text)
