"""Metrics: key, unit and text of each, declared once. Used by docs/metrics.md and the console.

A callback's metric needs no declaration. With one, it appears under a label and with a unit:

    register_metric(Metric("my/digits", "share", "characters that are digits", label="digits", style=".0%"))
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """Declaration of one key of metrics.jsonl, or of all keys of a form: <name> stands for any text."""

    key: str
    unit: str
    text: str
    label: str = ""
    """Short name for the console."""
    style: str = ".4g"
    """Format of a value in the console."""

    def matches(self, key: str) -> bool:
        """Return whether the declaration is that of `key`."""
        return re.fullmatch(re.sub(r"<\w+>", ".+", re.escape(self.key)), key) is not None

    def show(self, value: float) -> str:
        """Return "KL 0.0012"."""
        return f"{self.label} {value:{self.style}}"


METRICS: dict[str, Metric] = {}
"""Declarations by key, in the order of docs/metrics.md."""


def register_metric(metric: Metric) -> Metric:
    """Add a declaration.

    Raises:
        ValueError: if the key has another declaration.
    """
    if METRICS.setdefault(metric.key, metric) != metric:
        raise ValueError(f"metric '{metric.key}' is registered already: choose another key")
    return metric


def find_metric(key: str) -> Metric | None:
    """Return the declaration of a key: the exact one before one with <name>; None if there is none."""
    return METRICS.get(key) or next((metric for metric in METRICS.values() if metric.matches(key)), None)


def is_interval(key: str) -> bool:
    """Return True for a part of the 95 % interval of another metric of a held-out evaluation."""
    return key.startswith("eval/") and re.search(r"[_/](ci95|low|high)$", key) is not None


def interval_of(values: Mapping[str, float], key: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a metric from what was logged beside it, or None.

    # eval/accuracy: eval/accuracy_low, eval/accuracy_high;  eval/reward/brevity/mean: eval/reward/brevity/low, ...
    """
    stem = key.removesuffix("mean") if key.endswith("/mean") else f"{key}_"
    low, high, half = (values.get(f"{stem}{part}") for part in ("low", "high", "ci95"))
    if low is not None and high is not None:
        return low, high
    return None if half is None else (values[key] - half, values[key] + half)  # older runs


def with_interval(values: Mapping[str, float], key: str) -> str:
    """Return "1.000 [0.981, 1.000]", "1.000" without an interval, "" without a value."""
    if values.get(key) is None:
        return ""
    between = interval_of(values, key)
    return f"{values[key]:.3f}" + ("" if between is None else f" [{between[0]:.3f}, {between[1]:.3f}]")


def markdown_table() -> list[str]:
    """Return the table of docs/metrics.md, a row per declaration."""
    rows = [f"| `{metric.key}` | {metric.unit} | {metric.text} |" for metric in METRICS.values()]
    return ["| key | unit | meaning |", "|---|---|---|", *rows]


_NATS = "nats per token"
_TRAINED = ". Mean over the tokens of the loss"
_FIRST = ". Mean over the tokens of the loss, in the first of `objective.num_iterations` passes"
_EXPERTS = "only for mixtures of experts that a loss balances: "
_LAST = ". Over the tokens of all rows that count in the last optimizer step, prompts included"
_DYNAMIC = "only with `sampling.dynamic_sampling`: "
_TURNS = "only with `tools` or `environment`: "
_CURRICULUM = "only with `curriculum.reward`: "
_PROSE = "only with `data.extractor quoted_terms`: "

for _metric in (
    Metric(
        "reward/mean", "reward", "weighted sum of the rewards, mean over all completions of the step", "reward", ".3f"
    ),
    Metric("reward/std", "reward", "its standard deviation"),
    Metric("reward/<name>/mean", "reward", "one reward function, before its weight"),
    Metric("reward/<name>/std", "reward", "its standard deviation"),
    Metric(
        "reward/<name>/errors",
        "completions",
        "not scored because the reward raised, crashed, or returned NaN, infinity, text, ...",
    ),
    Metric("reward/<name>/timeouts", "completions", "not scored before the deadline (`scoring.deadline`)"),
    Metric(
        "reward/zero_std_fraction", "share", "groups whose advantages are all 0: nothing to learn from", "flat", ".0%"
    ),
    Metric("policy/loss", "", "the objective, summed over the optimizer steps of this step"),
    Metric(
        "policy/kl",
        _NATS,
        "KL estimate to the reference; 0 if `objective.beta` is 0" + _TRAINED + ", over all passes (with "
        "`objective.kl_in_reward`: over all tokens of the completions to train on, before the update)",
        "KL",
        ".4f",
    ),
    Metric("policy/entropy", _NATS, "entropy of the token distribution" + _FIRST, "entropy", ".2f"),
    Metric(
        "policy/clip_fraction",
        "share",
        "tokens whose ratio was clipped; 0 with one iteration, by definition" + _TRAINED + ", over all passes. With "
        "the ratio of whole completions, every token of a clipped completion counts",
        "clipped",
        ".0%",
    ),
    Metric(
        "policy/grad_norm",
        "",
        "norm of the gradient before clipping, mean over the optimizer steps; 0 in a step without one",
    ),
    Metric(
        "policy/skipped_steps",
        "optimizer steps",
        "skipped because the loss or the gradient was not finite; after 3 in a row the run ends with code 4",
    ),
    Metric("policy/learning_rate", "", "learning rate of this step"),
    Metric(
        "policy/sampling_logprob_difference",
        _NATS,
        "absolute difference between sampling and training logprobs: rounding, or a bug" + _FIRST,
    ),
    Metric(
        "policy/entropy_coef", "", "only with `objective.use_adaptive_entropy`: weight of the entropy after this step"
    ),
    Metric(
        "policy/router_aux_loss",
        "",
        _EXPERTS
        + "load-balancing loss before its coefficient; the number of experts per token if all is balanced"
        + _LAST,
    ),
    Metric(
        "policy/expert_load_max",
        "",
        _EXPERTS + "tokens of the busiest expert of any layer over its fair share; 1 if all is balanced" + _LAST,
    ),
    Metric("policy/experts_unused", "share", _EXPERTS + "experts of all layers that no token went to" + _LAST),
    Metric("policy/beta", "", "only with `objective.kl_target`, which adapts it: weight of the KL in this step"),
    Metric("rollout/sampling_rounds", "rounds", _DYNAMIC + "rounds of sampling in this step"),
    Metric("rollout/groups_sampled", "groups", _DYNAMIC + "groups that were sampled"),
    Metric("rollout/groups_trained", "groups", _DYNAMIC + "groups that were not flat"),
    Metric(
        "rollout/staleness",
        "steps",
        "only with `rollout.max_staleness`: steps of the policy since it sampled these completions",
    ),
    Metric(
        "rollout/length_mean",
        "tokens",
        "completion length; with several turns, without the tokens that tools or an environment gave",
        "length",
        ".0f",
    ),
    Metric(
        "rollout/truncated_fraction",
        "share",
        "completions cut off at `sampling.max_completion_length`",
        "truncated",
        ".0%",
    ),
    Metric("rollout/tokens", "tokens", "completions and, once for each completion, its prompt; over all processes"),
    Metric("rollout/turns", "turns", _TURNS + "turns of the model per completion", "turns", ".2f"),
    Metric("rollout/turn_length", "tokens", _TURNS + "tokens of one turn of the model"),
    Metric("tools/calls", "calls", _TURNS + "tool calls in all completions of the step", "calls", ".0f"),
    Metric(
        "tools/failures",
        "calls",
        _TURNS + "calls (or steps of an environment) that failed or were no valid call: the model read the error",
    ),
    Metric(
        "rollout/tokens_per_second",
        "tokens per second",
        "completion tokens over the seconds of sampling (whether training waited for it or not), over all processes",
    ),
    Metric("curriculum/solved", "prompts", _CURRICULUM + "set aside now because they are solved"),
    Metric("curriculum/hopeless", "prompts", _CURRICULUM + "set aside now because no completion earns anything"),
    Metric("curriculum/active", "prompts", _CURRICULUM + "drawn in this epoch"),
    Metric("time/step", "seconds", "the whole step, on the main process"),
    Metric(
        "time/rollout",
        "seconds",
        "training waited for completions. With `rollout.max_staleness` it samples while it trains",
    ),
    Metric(
        "time/reward",
        "seconds",
        "training waited for rewards, which are computed while it samples and while the reference is computed",
    ),
    Metric("time/reference", "seconds", "reference logprobs"),
    Metric("time/update", "seconds", "forward, backward and optimizer steps"),
    Metric("memory/peak_gib", "GiB", "most memory that the main process ever held (GPU memory on CUDA)"),
    Metric("eval/accuracy", "share", "held out, greedy: right values", "held-out accuracy", ".3f"),
    Metric("eval/accuracy_flexible", "share", "the gold value is the last number of the answer, whatever the format"),
    Metric("eval/accuracy_ci95", "share", "half the width of the 95 % interval of `eval/accuracy`"),
    Metric("eval/accuracy_low", "share", "lower end of this interval (Wilson)"),
    Metric("eval/accuracy_high", "share", "upper end of this interval (Wilson)"),
    Metric("eval/reward/<name>/mean", "reward", "held out, greedy: each reward of the run"),
    Metric("eval/reward/<name>/ci95", "reward", "half the width of the 95 % interval of this mean"),
    Metric("eval/reward/<name>/low", "reward", "lower end of this interval (Wilson if the reward is 0 or 1)"),
    Metric("eval/reward/<name>/high", "reward", "upper end of this interval"),
    Metric("eval/format", "share", "held out, greedy: answers in the XML format"),
    Metric(
        "eval/chrf",
        "share",
        _PROSE + "nearness to the full answer, in characters. `eval/accuracy` is then the share of "
        "answers that quote exactly the gold terms, `eval/format` the share that quote any",
    ),
    Metric("eval/token_f1", "share", _PROSE + "nearness to the full answer, in words"),
    Metric("eval/length_mean", "tokens", "length of the held-out completions"),
    Metric("eval/truncated_fraction", "share", "held-out completions that were cut off"),
    Metric(
        "gradient/<layer>",
        "",
        "only with `callbacks: [layer_gradient_norms]`: norm of each layer's gradient as the optimizer got it, "
        "after clipping",
    ),
):
    register_metric(_metric)
