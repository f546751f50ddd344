"""Step metrics: one step -> its row of metrics and its rollout rows. docs/metrics.md explains every key."""

from accelerate import Accelerator
from torch import Tensor

from grpo.config.schema import Config
from grpo.experience import Sampled
from grpo.rewards.context import Notes
from grpo.rewards.registry import reward_labels
from grpo.rewards.scoring import Scores
from grpo.rollout.dialogue import has_turns, recorded_columns
from grpo.runtime.device import peak_memory
from grpo.runtime.distributed import gather_rows, merge_sums
from grpo.runtime.sums import Sums
from grpo.types import Group, question_of

OVER_TRAINED_TOKENS = {
    "policy/kl": "kl",
    "policy/entropy": "entropy",
    "policy/clip_fraction": "clipped",
    "policy/sampling_logprob_difference": "mismatch",
}
"""Metrics that are means over the tokens of the loss -> their sums."""


def step_metrics(
    config: Config,
    accelerator: Accelerator,
    sampled: Sampled,
    advantages_PG: Tensor,
    sums: Sums,
    laps: dict[str, float],
    entropy_coef: float = 0.0,
) -> dict[str, float]:
    """Return the metrics of one step, over all ranks and everything that was sampled. Collective.

    Args:
        advantages_PG: Of everything that was sampled, 0 for what was dropped.
        sums: Token sums of the update.
        laps: Seconds by phase.
        entropy_coef: Coefficient of the entropy bonus after the step.
    """
    groups, scores = sampled.groups, sampled.scores
    lengths = [len(completion.sampled) for group in groups for completion in group.completions]
    ended = [completion.ended for group in groups for completion in group.completions]
    for name in ("kl", "clipped", "entropy", "mismatch", "grad_norm", "loss", "skipped"):
        sums.add(name, 0.0, 0.0)  # every rank must hold every name
    sums.add_values("reward", scores.rewards_PG)
    for name, values in scores.by_name.items():
        sums.add_values(f"reward/{name}", values)
        failed = [failure.timed_out for failure in scores.failures if failure.reward == name]
        sums.add(f"timeouts/{name}", sum(failed), 0)
        sums.add(f"errors/{name}", len(failed) - sum(failed), 0)
    sums.add("flat", (advantages_PG == 0).all(1).sum(), len(groups))
    sums.add("length", sum(lengths), len(lengths))
    sums.add("truncated", len(ended) - sum(ended), len(ended))
    sums.add("tokens", sum(lengths) + sum(len(g.prompt.token_ids) * len(g.completions) for g in groups), 0)
    sums.add("trained_groups", len(sampled.kept), 0)
    sums.add("sampled_groups", len(groups), 0)
    if has_turns(config):
        add_turns(groups, sums)
    merge_sums(accelerator, sums)
    tokens = sums.total("length")
    metrics = {
        "reward/mean": sums.mean("reward"),
        "reward/std": sums.std("reward"),
        "reward/zero_std_fraction": sums.mean("flat"),
        "policy/loss": sums.total("loss"),
        "policy/grad_norm": sums.mean("grad_norm"),
        "policy/skipped_steps": sums.total("skipped") / accelerator.num_processes,
        "policy/learning_rate": sums.mean("learning_rate"),
        "rollout/length_mean": sums.mean("length"),
        "rollout/truncated_fraction": sums.mean("truncated"),
        "rollout/tokens": sums.total("tokens"),
        "rollout/tokens_per_second": tokens / max(sampled.seconds, 1e-9),
        "time/step": sum(laps.values()),
        "time/rollout": laps["rollout"],
        "time/reward": laps["reward"],
        "time/reference": laps["reference"],
        "time/update": laps["update"],
        "memory/peak_gib": peak_memory(accelerator.device) / 2**30,
    }
    # A step that trained no token has no mean over trained tokens. 0 would read as a measurement.
    metrics |= {key: sums.mean(name) for key, name in OVER_TRAINED_TOKENS.items() if sums.count(name)}
    if config.objective.beta == 0:
        metrics["policy/kl"] = 0.0
    if config.objective.use_adaptive_entropy:
        metrics["policy/entropy_coef"] = entropy_coef
    if config.rollout.max_staleness:
        metrics["rollout/staleness"] = float(sampled.staleness)
    if config.sampling.dynamic_sampling:
        metrics["rollout/sampling_rounds"] = float(sampled.rounds)
        metrics["rollout/groups_sampled"] = sums.total("sampled_groups")
        metrics["rollout/groups_trained"] = sums.total("trained_groups")
    if has_turns(config):
        metrics["rollout/turns"] = sums.mean("turns")
        metrics["rollout/turn_length"] = sums.total("length") / max(1.0, sums.total("turns"))
        metrics["tools/calls"], metrics["tools/failures"] = sums.total("calls"), sums.total("failures")
    for name, label in reward_labels(scores.by_name).items():
        metrics[f"reward/{label}/mean"] = sums.mean(f"reward/{name}")
        metrics[f"reward/{label}/std"] = sums.std(f"reward/{name}")
        metrics[f"reward/{label}/errors"] = sums.total(f"errors/{name}")
        metrics[f"reward/{label}/timeouts"] = sums.total(f"timeouts/{name}")
    for name, value in recorded_metrics(accelerator, scores.notes).items():
        metrics[f"custom/{name}" if name in metrics else name] = value
    return metrics


def add_turns(groups: list[Group], sums: Sums) -> None:
    """Add the numbers of turns, tool calls and failures of the completions."""
    records = [completion.turns for group in groups for completion in group.completions]
    turns = sum(message["role"] == "assistant" for record in records for message in record.get("messages", []))
    sums.add("turns", turns, len(records))
    for name in ("calls", "failures"):
        sums.add(name, sum(record.get(name, 0) for record in records), 0)


def recorded_metrics(accelerator: Accelerator, notes: Notes) -> dict[str, float]:
    """Return the means of what rewards recorded with `log_metric`, over all ranks. Collective."""
    values: dict[str, list[float]] = {}
    for row in gather_rows(accelerator, [notes.metrics]):
        for name, found in row.items():
            values.setdefault(name, []).extend(found)
    return {name: sum(found) / len(found) for name, found in sorted(values.items()) if found}


def rollout_rows(step: int, groups: list[Group], scores: Scores, advantages_PG: Tensor) -> list[dict]:
    """Return one row per completion of this rank. What rewards recorded with `log_extra` is in `extra`."""
    rows: list[dict] = []
    labels = reward_labels(scores.by_name)
    for p, group in enumerate(groups):
        prompt = question_of(group.prompt.messages)
        for s, completion in enumerate(group.completions):
            rows.append(
                {
                    "step": step,
                    "draw": group.prompt.draw,
                    "sample": s,
                    "prompt": prompt,
                    "completion": completion.text,
                    "reward": float(scores.rewards_PG[p, s]),
                    "advantage": float(advantages_PG[p, s]),
                    "rewards": {labels[name]: float(values[p, s]) for name, values in scores.by_name.items()},
                    "length": len(completion.sampled),
                    "ended": completion.ended,
                    "columns": recorded_columns(group.prompt, ("question",)),
                    **({"turns": completion.turns} if completion.turns else {}),
                }
            )
            index = p * len(group.completions) + s
            extra = {name: found[index] for name, found in scores.notes.extra.items() if index in found}
            if extra:
                rows[-1]["extra"] = extra
    return rows
