"""Evaluation: held-out prompts -> accuracy and format, greedy or pass@k, with the engine and rewards of training."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from grpo.errors import RewardError
from grpo.rewards.number_text import last_number, parse_number
from grpo.rewards.registry import after_thinking, reward_labels
from grpo.rewards.scoring import RewardSum
from grpo.rewards.text_match import quoted_terms, same_text
from grpo.rewards.xml_format import lenient_answer
from grpo.rollout.dialogue import recorded_columns
from grpo.rollout.engine import RolloutEngine
from grpo.runtime.distributed import gather_rows
from grpo.runtime.statistics import mcnemar, mean_interval, pass_at_k, wilson_interval
from grpo.types import Group, Prompt, SamplingPlan, prefill_of, question_of

log = logging.getLogger(__name__)

SCORES = {"accuracy": 1.0, "xml_format": 1.0}
"""Rewards of the evaluation, independent of the training rewards."""
PROSE_SCORES = {"term_match": 1.0, "chrf": 1.0, "token_f1": 1.0}
"""Rewards for prose with quoted terms: accuracy = exactly the gold terms, format = any quoted term."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and one row per completion.

    A row has draw, sample, question, answer, completion, accuracy, flexible, format, length, ended, and the other
    columns. accuracy and flexible are None where there is no gold answer.
    """

    metrics: dict[str, float]
    rows: list[dict]


def evaluate(
    engine: RolloutEngine,
    prompts: list[Prompt],
    accelerator: Accelerator,
    *,
    max_completion_length: int,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    limits: Mapping[str, Any] | None = None,
    prose: bool = False,
    rewards: RewardSum | None = None,
) -> Evaluation:
    """Score `samples` completions of every prompt; temperature 0 is greedy. Collective: all ranks return the same.

    `limits`: top_p, top_k, min_p and repetition_penalty, where they are not off.

    Metrics: eval/accuracy, eval/accuracy_flexible (the last number, in any format), eval/format, eval/length_mean,
    eval/truncated_fraction, eval/accuracy_ci95 (half the width of the 95 % interval), and eval/pass@k for k = 2, 4, ...
    up to `samples`; with prose also eval/chrf and eval/token_f1, and no accuracy_flexible. `rewards`, those of the
    training, give eval/reward/<name>/mean.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    plan = SamplingPlan(samples, max_completion_length, temperature, seed, **(limits or {}))
    with torch.no_grad(), accelerator.autocast():
        groups = engine.generate(prompts[rank::world], plan)
    mine: list[dict] = []
    if groups:
        accuracy_PG, format_PG, more = score_groups(groups, prose)
        own = own_rewards(groups, rewards)
        for p, group in enumerate(groups):
            gold = group.prompt.columns.get("answer")
            unknown, prefill = gold is None, prefill_of(group.prompt.messages)
            for s, completion in enumerate(group.completions):
                flexible = is_correct_in_any_format(prefill + completion.text, gold)
                mine.append(
                    {
                        "draw": group.prompt.draw,
                        "sample": s,
                        "question": question_of(group.prompt.messages),
                        "answer": gold,
                        "completion": completion.text,
                        "accuracy": None if unknown else float(accuracy_PG[p, s].nan_to_num()),
                        "flexible": None if unknown else float(flexible),
                        "format": float(format_PG[p, s]),
                        "length": len(completion.sampled),
                        "ended": completion.ended,
                        "columns": recorded_columns(group.prompt, ("question", "answer")),
                        "rewards": {name: _known(values[p, s]) for name, values in own.items()},
                        **{name: float(values[p, s].nan_to_num()) for name, values in more.items()},
                        **({"turns": completion.turns} if completion.turns else {}),
                    }
                )
    rows = sorted(gather_rows(accelerator, mine), key=lambda row: (row["draw"], row["sample"]))
    return Evaluation(summarize(rows, samples), rows)


def own_rewards(groups: list[Group], rewards: RewardSum | None) -> dict[str, Tensor]:
    """Return the rewards of the run [P, G] by their short names; {} where they cannot score held-out rows."""
    if rewards is None:
        return {}
    try:
        rewards.submit(groups)
        by_name = rewards.collect().by_name
    except RewardError as error:  # a column may be missing in the held-out rows; training goes on
        log.warning("the rewards could not score the held-out prompts: %s", error)
        return {}
    labels = reward_labels(by_name)
    return {labels[name]: values for name, values in by_name.items()}


def _known(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def score_groups(groups: list[Group], prose: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return accuracy [P, G], format [P, G], and other scores by name."""
    # Rows in TRL's form may have no gold answer: then only the format can be judged.
    known = all("answer" in group.prompt.columns for group in groups)
    if prose and known:
        values = RewardSum(PROSE_SCORES)(groups).by_name
        quoted = [[float(bool(quoted_terms(c.text))) for c in group.completions] for group in groups]
        exact = (values.pop("term_match") == 1.0).double()
        return exact, torch.tensor(quoted, dtype=torch.float64), values
    scores = RewardSum(SCORES if known else {"xml_format": 1.0})(groups)
    format_PG = scores.by_name["xml_format"]
    return scores.by_name.get("accuracy", torch.zeros_like(format_PG)), format_PG, {}


def summarize(rows: list[dict], samples: int) -> dict[str, float]:
    """Return means over completions; pass@k is a mean over prompts. Accuracies are over rows with a gold answer."""
    count = len(rows)
    if not count:
        return {}
    judged = [row for row in rows if row["accuracy"] is not None]
    metrics = {}
    if judged:
        accuracy = sum(row["accuracy"] for row in judged) / len(judged)
        metrics = {
            "eval/accuracy": accuracy,
            **_accuracy_interval(judged),
        }
        if "chrf" not in rows[0]:  # prose has no last number
            metrics["eval/accuracy_flexible"] = sum(row["flexible"] for row in judged) / len(judged)
    metrics |= {
        "eval/format": sum(row["format"] for row in rows) / count,
        "eval/length_mean": sum(row["length"] for row in rows) / count,
        "eval/truncated_fraction": sum(not row["ended"] for row in rows) / count,
    }
    for name in ("chrf", "token_f1"):
        if name in rows[0]:
            metrics[f"eval/{name}"] = sum(row[name] for row in rows) / count
    for name in dict.fromkeys(name for row in rows for name in row.get("rewards", {})):
        metrics |= _reward_metrics(name, rows)
    right: dict[int, int] = {}
    for row in judged:
        right[row["draw"]] = right.get(row["draw"], 0) + int(row["accuracy"])
    k = 2
    while right and k <= samples:
        metrics[f"eval/pass@{k}"] = sum(pass_at_k(correct, samples, k) for correct in right.values()) / len(right)
        k *= 2
    return metrics


def _reward_metrics(name: str, rows: list[dict]) -> dict[str, float]:
    """Return the mean of a reward with its 95 % interval over prompts: Wilson's if the reward is 0 or 1.

    Without an interval where it is unknown: one prompt, or one value of a reward that is not 0 or 1.
    """
    by_prompt: dict[int, list[float]] = {}
    for row in rows:
        value = row.get("rewards", {}).get(name)
        if value is not None:
            by_prompt.setdefault(row["draw"], []).append(value)
    values = [value for each in by_prompt.values() for value in each]
    if not values:
        return {}
    means = [sum(each) / len(each) for each in by_prompt.values()]
    found, interval = {"mean": sum(values) / len(values)}, None
    if len(values) == len(means) and set(values) <= {0.0, 1.0}:
        interval = wilson_interval(round(sum(values)), len(values))
    elif len(set(means)) > 1:
        interval = mean_interval(means)
    if interval is not None:
        found |= {"ci95": (interval[1] - interval[0]) / 2, "low": interval[0], "high": interval[1]}
    return {f"eval/reward/{name}/{part}": value for part, value in found.items()}


def _accuracy_interval(judged: list[dict]) -> dict[str, float]:
    """Return the 95 % interval of the accuracy and half its width. It stays in [0, 1], and is not empty at 0 or 1."""
    low, high = intervals(judged)["accuracy"]
    low, high = max(0.0, low), min(1.0, high)
    return {"eval/accuracy_ci95": (high - low) / 2, "eval/accuracy_low": low, "eval/accuracy_high": high}


def is_correct_in_any_format(text: str, gold: object) -> bool:
    """Flexible scoring: the last number of the answer block or of the text is the gold value; a gold text is the block.

    Compared with the strict accuracy it separates errors of calculation from errors of format.
    """
    if gold is None:
        return False
    value, given = parse_number(str(gold)), lenient_answer(after_thinking(text))
    return same_text(given, str(gold)) if value is None else last_number(given) == value


def intervals(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """95 % intervals of the accuracies: Wilson with one completion per item, else over the means of the items."""
    found: dict[str, tuple[float, float]] = {}
    for name in ("accuracy", "flexible"):
        items = item_means(rows, name) if all(name in row for row in rows) else {}
        if not items:
            continue
        one_each = len(items) == sum(row[name] is not None for row in rows)
        right = round(sum(items.values()))
        found[name] = wilson_interval(right, len(items)) if one_each else mean_interval(list(items.values()))
    return found


def item_means(rows: list[dict], name: str = "accuracy") -> dict[int, float]:
    """Return the mean of each item over its samples (avg@k), without items that have no gold answer."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row[name] is None:
            continue
        values.setdefault(row["draw"], []).append(row[name])
    return {draw: sum(scores) / len(scores) for draw, scores in values.items()}


def compare(base: list[dict], trained: list[dict], name: str = "accuracy") -> dict[str, float]:
    """Compare two models on the same items: the change with its 95 % interval, discordant counts, and McNemar's p.

    The test uses the first sample of each item, so that items are independent.
    """
    before, after = item_means(base, name), item_means(trained, name)
    assert before.keys() == after.keys(), "both models must have answered the same items"
    changes = [after[draw] - before[draw] for draw in before]
    low, high = mean_interval(changes)
    first = {row["draw"]: row[name] > 0 for row in base if row["sample"] == 0 and row["draw"] in before}
    second = {row["draw"]: row[name] > 0 for row in trained if row["sample"] == 0 and row["draw"] in after}
    only_base = sum(first[draw] and not second[draw] for draw in first)
    only_trained = sum(second[draw] and not first[draw] for draw in first)
    return {
        "change": sum(changes) / len(changes),
        "change_low": low,
        "change_high": high,
        "only_base_right": only_base,
        "only_trained_right": only_trained,
        "mcnemar_p": mcnemar(only_base, only_trained),
    }
