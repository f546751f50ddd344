"""Curves of the dashboard, each with a hint for the reader. A test compares the hints with docs/metrics.md.

run directories -> the lines of each curve, a table of results, a table of different config keys
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from grpo.rewards.registry import reward_labels
from grpo.tracking.drawing import PALETTE, Line
from grpo.tracking.run_reader import MetricsFile, RunFolder, extremes, thin

POINTS = 300
"""Points in one line of a curve, about one per pixel that can be told apart."""


@dataclass(frozen=True)
class Curve:
    """One plot of the dashboard."""

    title: str
    keys: str
    """Pattern of metric keys. Each key that matches it as a whole is a line."""
    hint: str
    """One line: the expected shape, and what to do if the curve has another one."""


CURVES = (
    Curve(
        "Reward",
        "reward/mean",
        "Should rise, with noise. Flat from the start: all groups score alike, so read the completions.",
    ),
    Curve(
        "Each reward",
        "reward/.+/mean",
        "Before weights. Format rewards rise first, correctness later. A reward that stays at 0 has no effect.",
    ),
    Curve(
        "Held-out accuracy",
        "eval/accuracy",
        "The main result. If the reward rises and this does not, the model exploits the reward.",
    ),
    Curve(
        "Held-out rewards",
        "eval/reward/.+/mean",
        "Each reward on held-out prompts, before weights. The main result where no answer is right or wrong.",
    ),
    Curve(
        "KL to the reference",
        "policy/kl",
        "Distance from the reference. A slow rise is normal. At a jump, lower the learning rate or raise beta.",
    ),
    Curve(
        "Entropy",
        "policy/entropy",
        "Uncertainty in nats per token. Near 0, all completions of a prompt are alike and nothing is learned.",
    ),
    Curve(
        "Completion length",
        "rollout/length_mean",
        "Tokens. Growing with accuracy: longer reasoning helps. Growing alone: the added text has no use.",
    ),
    Curve(
        "Clipped, truncated, flat",
        "policy/clip_fraction|rollout/truncated_fraction|reward/zero_std_fraction",
        "Shares that slow learning. Many truncated: raise max_completion_length. Many flat: too easy or too hard.",
    ),
    Curve(
        "Gradient norm",
        "policy/grad_norm",
        "Before clipping. Should be steady. A spike together with a jump of the KL: the step was too large.",
    ),
    Curve(
        "Learning rate",
        "policy/learning_rate",
        "Learning rate of each step, from the schedule.",
    ),
    Curve(
        "Tokens per second",
        "rollout/tokens_per_second",
        "Speed of sampling. It falls if completions get longer, or if other programs use the machine.",
    ),
    Curve(
        "Memory",
        "memory/peak_gib",
        "Peak so far, in GiB. A rise after the first steps: longer completions, or a leak.",
    ),
    Curve(
        "Seconds per phase",
        "time/(rollout|reward|reference|update)",
        "Sampling should take most of the time. A long reward phase: a slow reward function.",
    ),
)


def lines_of(curve: Curve, runs: Sequence[RunFolder], smoothing: float = 0.0) -> list[Line]:
    """Return all lines of a curve. A line is named after its run, its metric, or both, so that names differ.

    Where several runs are shown, a color belongs to a run, in every curve, and a dash pattern to a metric.
    """
    found = [(run, key) for run in runs for key in keys_of(curve, run.metrics)]
    keys = list(dict.fromkeys(key for _, key in found))
    several_runs, several_keys = len({id(run) for run, _ in found}) > 1, len(keys) > 1
    colors = colors_of(runs)
    lines = []
    for run, key in found:
        steps, values = run.metrics.arrays(key)
        if not len(values):
            continue
        short = short_name(key)
        name = f"{short} · {run.name}" if several_runs and several_keys else run.name if several_runs else short
        smoothed = smooth(values, smoothing)
        at, means = (np.array(each) for each in thin(steps, smoothed, POINTS))
        ends = (float(steps[0]), float(steps[-1]))
        line = Line(name, at, means, *extremes(smoothed, POINTS), ends, last=float(values[-1]))
        if len(runs) > 1:
            line = replace(line, color=colors[run.name], dash=keys.index(key))
        lines.append(line)
    return lines


def colors_of(runs: Sequence[RunFolder]) -> dict[str, int]:
    """Return the index of each run's color by its name: the run's own, unless another of these runs has it."""
    colors: dict[str, int] = {}
    for place, run in enumerate(runs):
        own = (place if run.color is None else run.color) % len(PALETTE)
        free = [index for index in (own, *range(len(PALETTE))) if index not in colors.values()]
        colors[run.name] = free[0] if free else own
    return colors


def main_key(run: RunFolder) -> str | None:
    """Return the metric that tells how good the model is: the held-out accuracy; without gold answers the held-out mean
    of the reward with the largest weight. None if the run has neither.
    """
    weights = {str(name): float(weight) for name, weight in (run.config().get("rewards") or {}).items()}
    heaviest = max(weights, key=lambda name: weights[name], default="")
    labels = reward_labels(weights)
    keys = ["eval/accuracy", f"eval/reward/{labels.get(heaviest, heaviest)}/mean"]
    return next((key for key in keys if len(run.metrics.arrays(key)[1])), None)


def keys_of(curve: Curve, metrics: MetricsFile) -> list[str]:
    """Return the keys of `metrics` that the curve shows."""
    return [key for key in metrics.columns if re.fullmatch(curve.keys, key)]


def other_keys(runs: Sequence[RunFolder]) -> list[str]:
    """Return the metrics of the runs that no curve shows, for example those of callbacks."""
    shown = re.compile("|".join(f"(?:{curve.keys})" for curve in CURVES))
    return sorted({key for run in runs for key in run.metrics.columns if not shown.fullmatch(key)})


def short_name(key: str) -> str:
    """Return a label: reward/accuracy/mean -> accuracy; policy/clip_fraction -> clip_fraction."""
    return re.sub(r"^[^/]+/|/mean$", "", key)


def smooth(values: np.ndarray, amount: float) -> np.ndarray:
    """Exponential moving average without bias at the start: s_t = sum of a^(t-i) x_i / sum of a^(t-i).

    `amount` is a; 0 returns the values unchanged.

    # values 1 3, amount 0.5  ->  1, (0.5 * 1 + 3) / 1.5 = 2.33
    """
    if amount <= 0 or len(values) < 2:
        return values
    total = weight = 0.0
    smoothed = np.empty(len(values))
    for index, value in enumerate(values.tolist()):
        total, weight = amount * total + value, amount * weight + 1.0
        smoothed[index] = total / weight
    return smoothed


def seconds_left(run: RunFolder) -> float | None:
    """Return the steps that are left times the median time of the last 20 steps; None if it is unknown."""
    steps, durations = run.config().get("steps"), run.metrics.arrays("time/step")[1]
    if run.finished or not isinstance(steps, int) or not len(durations):
        return None
    return float(max(0, steps - run.metrics.steps[-1]) * np.median(durations[-20:]))


def state_of(run: RunFolder) -> str:
    """Return "finished", "training", or "stopped" (nothing written for ten steps' time and at least a minute)."""
    if run.finished:
        return "finished"
    durations = run.metrics.arrays("time/step")[1]
    step = float(np.median(durations[-20:])) if len(durations) else 60.0
    return "training" if run.seconds_quiet < max(60.0, 10 * step) else "stopped"


def comparison(runs: Sequence[RunFolder]) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows) of a table with the results of each run."""
    headings = ["run", "state", "steps", "held out", "before", "after", "reward, last tenth", "tokens/s", "hours"]
    rows = []
    for run in runs:
        key = main_key(run)
        main, reward = run.metrics.arrays(key or "")[1], run.metrics.arrays("reward/mean")[1]
        speed, seconds = run.metrics.arrays("rollout/tokens_per_second")[1], run.metrics.arrays("time/step")[1]
        late = reward[-max(1, len(reward) // 10) :]
        rows.append(
            [run.name, state_of(run), str(run.metrics.steps[-1]) if run.metrics.steps else "0"]
            + [short_name(key.removeprefix("eval/") if key.endswith("/mean") else key) if key else ""]
            + [f"{value:.3f}" if value is not None else "" for value in (_at(main, 0), _at(main, -1))]
            + [f"{late.mean():.3f}" if len(late) else "", f"{np.median(speed):.0f}" if len(speed) else ""]
            + [f"{seconds.sum() / 3600:.2f}"]
        )
    return headings, rows


def differences(runs: Sequence[RunFolder]) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows) of a table with the config keys whose values differ between the runs."""
    flat = [_flatten(run.config()) for run in runs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    rows = [[key, *(str(config.get(key, "not set")) for config in flat)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1 and row[0] not in ("run_dir", "tracking.run_name")]
    return ["key", *(run.name for run in runs)], rows


def _at(values: np.ndarray, index: int) -> float | None:
    return float(values[index]) if len(values) else None


def _flatten(nested: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
