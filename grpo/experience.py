"""Experience: prompts -> sampled and scored groups -> what is learned from: the completions that count, and their advantages.

Everything here is the plain loop unless a setting asks for more:

    sampling.dynamic_sampling      flat groups are left out, other prompts are sampled in their place
    objective.soft_overlong_cache  one more reward
    objective.subset               only some completions of each group are kept
    objective.kl_in_reward         the KL to the reference is taken off the reward
    rollout.max_staleness          completions of later steps are sampled meanwhile (grpo/rollout/async_sampler.py)
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo.advantages import ADVANTAGES, SUBSETS, overlong_penalty
from grpo.config.schema import Config, ObjectiveConfig
from grpo.kl import kl_estimate
from grpo.losses import by_name, find_objective, per_sequence
from grpo.models.logprob_model import probe_batch
from grpo.packing import PackedBatch, pack
from grpo.rewards.scoring import Scores
from grpo.runtime.distributed import gather_rows, max_over_ranks, sum_over_ranks
from grpo.runtime.sums import Sums
from grpo.types import Group, Prompt

if TYPE_CHECKING:
    from grpo.run.state import Run
    from grpo.runtime.timing import Clock


@dataclass(frozen=True)
class Sampled:
    """All that this rank sampled in a step, and which of it is learned from."""

    groups: list[Group]
    scores: Scores
    rows: list[int]
    """indices into groups"""
    rounds: int = 1
    references: list[Tensor | None] | None = None
    """logprobs of the reference for each packed batch, where they could be computed while the rewards were"""
    seconds: float = 0.0
    """of sampling"""
    staleness: int = 0
    """Steps that the policy has taken since it was the one that sampled."""


@dataclass(frozen=True)
class Experience:
    """What is learned from. P groups (fewer than were sampled, where some were left out), G completions each."""

    groups: list[Group]
    advantages_PG: Tensor
    all_advantages_PG: Tensor
    """Of everything that was sampled, 0 for what was left out: for the records."""
    references: list[Tensor | None] | None = None
    """See Sampled."""


def sample(run: "Run", done: int, clock: "Clock") -> Sampled:
    """The next prompts_per_step prompts, completed and scored; with dynamic_sampling, that many groups that are not flat
    (DAPO, arXiv 2503.14476, section 3.2), or what max_sampling_rounds gave.

    Which prompts come next is counted (`run.progress.draws`), so a resumed run, and any number of ranks, sample the same.
    `done` counts the steps that the policy has taken.
    """
    config, accelerator = run.config, run.accelerator
    dynamic, wanted = config.sampling.dynamic_sampling, config.prompts_per_step
    groups: list[Group] = []
    scores: list[Scores] = []
    kept: list[int] = []
    found, rounds, seconds, version = 0, 0, 0.0, done
    references: list[Tensor | None] | None = None
    while rounds < (config.sampling.max_sampling_rounds if dynamic else 1) and found < wanted:
        count = math.ceil((wanted - found) * config.sampling.oversample) if dynamic else wanted
        batch = run.ahead.take(lambda count=count: next_prompts(run, count), done)  # type: ignore[misc]
        new, version = batch.groups, batch.version
        seconds += batch.seconds
        clock.lap("rollout")
        run.score.submit(new)
        if packed_before_rewards(run.config):
            references = run.policy.reference_logprobs(
                packed(run, new, torch.zeros(len(new), config.sampling.num_generations))[0]
            )
        clock.lap("reference")
        scores.append(scored(run, new))
        clock.lap("reward")
        kept += [len(groups) + p for p in range(len(new)) if not dynamic or varies(scores[-1].rewards_PG[p])]
        groups += new
        rounds += 1
        found = int(sum_over_ranks(accelerator, [float(len(kept))])[0])
    if dynamic and found > wanted:  # the first ones drawn, whoever has them: the same for any number of ranks
        everyone = gather_rows(accelerator, [{"draw": groups[row].prompt.draw} for row in kept])
        taken = set(sorted(row["draw"] for row in everyone)[:wanted])
        kept = [row for row in kept if groups[row].prompt.draw in taken]
    return Sampled(groups, joined(scores), kept, rounds, references, seconds, done - version)


def next_prompts(run: "Run", count: int) -> list[Prompt]:
    """This rank's share of the next `count` prompts."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    prompts = run.stream.draws(run.progress.draws, count, rank, world)
    run.progress.draws += count
    return prompts


def varies(rewards_G: Tensor) -> bool:
    known = rewards_G[~rewards_G.isnan()]
    return len(known) > 0 and bool(known.min() < known.max())


def scored(run: "Run", groups: list[Group]) -> Scores:
    """The rewards of what was submitted, and DAPO's overlong penalty as one more where it is asked for."""
    scores = run.score.collect()
    cache = run.config.objective.soft_overlong_cache
    if not cache:
        return scores
    penalty_PG = overlong_penalty(lengths_of(groups), run.config.sampling.max_completion_length, cache)
    return replace(
        scores, rewards_PG=scores.rewards_PG + penalty_PG, by_name={**scores.by_name, "overlong": penalty_PG}
    )


def joined(parts: list[Scores]) -> Scores:
    """Rounds of sampling -> one. A round in which this rank had no prompt adds nothing."""
    real = [part for part in parts if len(part.rewards_PG)] or parts[:1]
    names = real[0].by_name
    return Scores(
        torch.cat([part.rewards_PG for part in real]),
        {name: torch.cat([part.by_name[name] for part in real]) for name in names},
        [failure for part in real for failure in part.failures],
    )


def lengths_of(groups: list[Group]) -> Tensor:
    """[P, G] float64: completion lengths."""
    return torch.tensor([[len(c.token_ids) for c in group.completions] for group in groups], dtype=torch.float64)


def compute_advantages(run: "Run", sampled: Sampled, sums: Sums) -> Experience:
    """Which completions count, and how much better each was than what it is compared with."""
    groups = [sampled.groups[row] for row in sampled.rows]
    rewards_PG, by_reward = sampled.scores.rewards_PG[sampled.rows], sampled.scores.by_name
    by_reward = {name: values[sampled.rows] for name, values in by_reward.items()}
    if run.config.objective.kl_in_reward:
        rewards_PG = rewards_PG - run.progress.beta * completion_kl(run, groups, sums)
    chosen_PK = chosen_completions(run, groups, rewards_PG)
    groups = [
        Group(group.prompt, [group.completions[s] for s in chosen])
        for group, chosen in zip(groups, chosen_PK.tolist(), strict=True)
    ]
    rewards_PG = rewards_PG.gather(1, chosen_PK)
    by_reward = {name: values.gather(1, chosen_PK) for name, values in by_reward.items()}
    advantages_PG = estimated(run, rewards_PG, by_reward)
    everything = torch.zeros_like(sampled.scores.rewards_PG)
    for row, chosen, advantages in zip(sampled.rows, chosen_PK, advantages_PG, strict=True):
        everything[row, chosen] = advantages
    return Experience(groups, advantages_PG, everything, sampled.references)


def kl_in_loss(objective: ObjectiveConfig) -> bool:
    return objective.beta > 0 and not objective.kl_in_reward


def packed_before_rewards(config: Config) -> bool:
    """Whether what goes through the model is known before the rewards are: then the reference can go first."""
    return kl_in_loss(config.objective) and not config.sampling.dynamic_sampling and subset_of(config.objective) is None


def packed(run: "Run", groups: list[Group], advantages_PG: Tensor) -> tuple[list[PackedBatch], int]:
    """-> what goes through the model, on its device, and how many of the batches are real.

    Every rank goes through the model equally often: one with less to train joins with empty-weighted batches.
    """
    config, policy = run.config.objective, run.policy
    batches = pack(
        groups,
        advantages_PG,
        max_tokens=run.config.tokens_per_batch,
        mask_truncated=config.mask_truncated_completions,
        skip_flat=not kl_in_loss(config) and config.entropy_coef == 0,  # then a zero advantage means a zero gradient
        share_prompts=policy.shares_prompts,
    )
    rounds, real = max_over_ranks(run.accelerator, len(batches)), len(batches)
    batches += [probe_batch(policy.model.config.vocab_size)] * (rounds - real)
    return [batch.to(policy.device) for batch in batches], real


def chosen_completions(run: "Run", groups: list[Group], rewards_PG: Tensor) -> Tensor:
    """[P, K] indices of the completions that are learned from: all of them, without objective.subset."""
    objective, size = run.config.objective, rewards_PG.shape[1]
    name = subset_of(objective)
    if name is None or not len(groups):
        return torch.arange(size).expand(len(groups), -1)
    keep = objective.subset_size or max(2, size // 2)
    return SUBSETS.get(name)(rewards_PG, lengths_of(groups), keep)


def subset_of(objective: ObjectiveConfig) -> str | None:
    """The config's own, else what loss_type implies."""
    return objective.subset or find_objective(objective.loss_type).implied.get("subset")


def estimated(run: "Run", rewards_PG: Tensor, by_reward: dict[str, Tensor]) -> Tensor:
    """[P, G] advantages of this rank's groups; the estimator sees the rewards of all ranks."""
    rank = run.accelerator.process_index
    rows = gather_rows(run.accelerator, [{"rank": rank, "rewards": rewards_PG, "by_reward": by_reward}])
    if not len(rewards_PG):
        return rewards_PG
    rows = [row for row in rows if len(row["rewards"])]
    offered = {
        "rewards_PG": torch.cat([row["rewards"] for row in rows]),
        "by_reward": {name: torch.cat([row["by_reward"][name] for row in rows]) for name in by_reward},
        "weights": {"overlong": 1.0, **run.score.weights},
        "scale": run.config.objective.scale_rewards,
    }
    before = sum(len(row["rewards"]) for row in rows if row["rank"] < rank)
    everyone = by_name(ADVANTAGES.get(estimator_of(run.config.objective)), offered)
    return everyone[before : before + len(rewards_PG)]


def estimator_of(objective: ObjectiveConfig) -> str:
    """The advantage estimator: the config's own, else what loss_type implies, else group."""
    if objective.advantage_estimator:
        return objective.advantage_estimator
    if objective.multi_objective_aggregation == "normalize_then_sum":
        return "gdpo"
    return find_objective(objective.loss_type).implied.get("advantage_estimator", "group")


def completion_kl(run: "Run", groups: list[Group], sums: Sums) -> Tensor:
    """[P, G]: the KL estimate of each whole completion, sum over its tokens of log p(sampling) - log p(reference) for k1."""
    size = len(groups[0].completions) if groups else 0
    kl = torch.zeros(len(groups) * size)
    # The place of each completion travels in the advantages, which nothing reads here: so packing may reorder.
    places_PG = torch.arange(len(groups) * size, dtype=torch.float64).reshape(len(groups), size)
    batches = pack(groups, places_PG, max_tokens=run.config.tokens_per_batch)
    empty = [probe_batch(run.policy.model.config.vocab_size)] * (
        max_over_ranks(run.accelerator, len(batches)) - len(batches)
    )
    for index, batch in enumerate(batches + empty):
        reference_N = run.policy.reference_logprobs([batch.to(run.policy.device)])[0]
        if index < len(batches) and reference_N is not None:
            kl_N = kl_estimate(batch.sampling_logprobs_N, reference_N.cpu(), run.config.objective.kl_estimator)
            kl[batch.advantages_N.long()] = per_sequence(kl_N, batch)
            sums.add("kl", kl_N.sum(), len(kl_N))
    return kl.reshape(len(groups), size).to(torch.float64)
