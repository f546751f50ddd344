"""Log names of TRL: the metrics and completions of a step -> TRL's keys, for log_history and the trackers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

RENAMED = {
    "policy/grad_norm": "grad_norm",
    "policy/learning_rate": "learning_rate",
    "policy/entropy": "entropy",
    "policy/router_aux_loss": "aux_loss",
    "policy/clip_fraction": "clip_ratio/region_mean",
    "policy/sampling_logprob_difference": "sampling/sampling_logp_difference/mean",
    "rollout/length_mean": "completions/mean_length",
    "rollout/truncated_fraction": "completions/clipped_ratio",
    "time/step": "step_time",
}
"""Metric here -> the same in TRL."""
LATEST = ("grad_norm", "learning_rate", "num_tokens")
"""Keys of which a log entry holds the latest value; of the others, the mean since the entry before."""
EVALUATED = {
    "eval/length_mean": "eval_completions/mean_length",
    "eval/truncated_fraction": "eval_completions/clipped_ratio",
}


def step_logs(metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]], updates: int, beta: float) -> dict:
    """Return the metrics of one step under TRL's names.

    Args:
        metrics: As in metrics.jsonl.
        rows: Completions of the step, as in rollouts.jsonl.
        updates: Optimizer steps of the step. The loss is their mean.
        beta: The KL coefficient: `kl` is logged with one.
    """
    logs = {"loss": metrics["policy/loss"] / updates}
    logs |= {theirs: metrics[ours] for ours, theirs in RENAMED.items() if ours in metrics}
    if beta and "policy/kl" in metrics:
        logs["kl"] = metrics["policy/kl"]
    return logs | completion_logs(rows)


def completion_logs(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what TRL logs of the completions of a step: lengths, rewards with their spread, and flat groups."""
    logs: dict[str, float] = {}
    for name, chosen in (("", rows), ("terminated_", [row for row in rows if row["ended"]])):
        lengths = [row["length"] for row in chosen] or [0]
        logs[f"completions/mean_{name}length"] = fmean(lengths)
        logs[f"completions/min_{name}length"] = float(min(lengths))
        logs[f"completions/max_{name}length"] = float(max(lengths))
    if any("turns" in row for row in rows):
        calls, failures = (sum(row.get("turns", {}).get(name, 0) for row in rows) for name in ("calls", "failures"))
        logs |= {"tools/call_frequency": calls / len(rows), "tools/failure_frequency": failures / max(1, calls)}
    for name in rows[0]["rewards"] if rows else ():
        logs |= _mean_and_std(f"rewards/{name}/mean", f"rewards/{name}/std", [row["rewards"][name] for row in rows])
    logs |= _mean_and_std("reward", "reward_std", [row["reward"] for row in rows])
    groups: dict[int, list[float]] = {}
    for row in rows:
        groups.setdefault(row["draw"], []).append(row["reward"])
    flat = [len({value for value in _known(values)}) <= 1 for values in groups.values()]
    return logs | {"frac_reward_zero_std": fmean(flat)} if flat else logs


def evaluation_logs(rows: Sequence[Mapping[str, Any]], weights: Mapping[str, float], prefix: str = "eval") -> dict:
    """Return what TRL logs of an evaluation.

    Args:
        rows: Completions, as in evaluations.jsonl.
        weights: Weight of each reward, by its short name.
        prefix: eval, or eval_NAME for one of several sets.
    """
    if not rows:
        return {}
    logs = {
        f"{prefix}_completions/mean_length": fmean(row["length"] for row in rows),
        f"{prefix}_completions/clipped_ratio": fmean(not row["ended"] for row in rows),
    }
    total = 0.0
    for name in rows[0].get("rewards", {}):
        known = _known(row["rewards"][name] for row in rows)
        if known:
            logs[f"{prefix}_rewards/{name}/mean"] = fmean(known)
            total += weights.get(name, 0.0) * fmean(known)
    return logs | {f"{prefix}_reward": total}


def merged(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of several steps' logs, and the latest value of those in LATEST."""
    keys = dict.fromkeys(key for entry in entries for key in entry)
    values = {key: [entry[key] for entry in entries if key in entry] for key in keys}
    return {key: found[-1] if key in LATEST else fmean(found) for key, found in values.items()}


def _mean_and_std(mean: str, std: str, values: Iterable[float | None]) -> dict[str, float]:
    known = _known(values)
    return {mean: fmean(known), std: stdev(known) if len(known) > 1 else 0.0} if known else {}


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and not math.isnan(value)]
