"""Experience: prompts -> sampled groups -> rewards -> advantages -> packed batches.

The default path is short. Each of these settings adds one thing to it:

    sampling.dynamic_sampling      flat groups are dropped and other prompts sampled in their place
    objective.soft_overlong_cache  one more reward: a length penalty
    objective.subset               only some completions of each group are trained
    objective.kl_in_reward         the KL to the reference is subtracted from the reward
    objective.mini_batches         the completions are packed in several parts, one for each optimizer step
    rollout.max_staleness          later steps are sampled meanwhile (grpo/rollout/async_sampler.py)
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from grpo.advantages import ADVANTAGES, SUBSETS, overlong_penalty
from grpo.config.schema import Config, ObjectiveConfig
from grpo.data.stream import PromptStream
from grpo.data.streaming import StreamedPrompts
from grpo.kl import kl_estimate
from grpo.losses import find_loss, per_sequence
from grpo.models.architecture import vocabulary_size
from grpo.models.logprob_model import probe_batch
from grpo.models.padded_rows import pack_rows
from grpo.objectives.entropy import has_entropy_bonus
from grpo.packing import PackedBatch, pack, regroup
from grpo.policy import Policy
from grpo.registry import call_with_supported_args
from grpo.rewards.context import TrainerState
from grpo.rewards.scoring import RewardSum, Scores, concatenate_scores
from grpo.rollout.async_sampler import AsyncSampler
from grpo.runtime.distributed import gather_rows, max_over_ranks, sum_over_ranks
from grpo.runtime.oom import FEW_TOKENS, phase
from grpo.runtime.sums import Sums
from grpo.runtime.timing import Clock
from grpo.types import Group, Prompt

log = logging.getLogger(__name__)


@dataclass
class Packed:
    """The batches of one mini-batch (the completions of one optimizer step), on the device."""

    batches: list[PackedBatch]
    """As many on every rank: a rank with fewer real ones is padded with zero-weight batches."""
    real: int
    """Number of batches that are not padding."""
    references: list[Tensor | None] = field(default_factory=list)
    """[N] reference logprobs of each batch; empty: not computed yet."""
    old: list[Tensor] = field(default_factory=list)
    """[N] logprobs of each batch under the policy before the first optimizer step; empty: not computed yet."""
    high_entropy: list[Tensor | None] = field(default_factory=list)
    """[N] tokens of high entropy in each batch (objective.top_entropy_quantile); None: all."""

    def real_references(self) -> list[tuple[PackedBatch, Tensor | None]]:
        """Return the batches that are not padding, with their reference logprobs [N]."""
        return list(zip(self.batches, self.references, strict=True))[: self.real]

    def with_advantages(self, advantages_PG: Tensor) -> "Packed":
        """Return the batches with the advantages [P, G] of the completions that were packed."""
        real = [batch.with_advantages(advantages_PG) for batch in self.batches[: self.real]]
        return replace(self, batches=real + self.batches[self.real :])


@dataclass(frozen=True)
class Sampled:
    """The completions that this rank sampled in one step, and their rewards."""

    groups: list[Group]
    scores: Scores
    kept: list[int]
    """Indices of the groups to train on."""
    rounds: int = 1
    """Rounds of sampling (dynamic sampling)."""
    packed: list[Packed] | None = None
    """The mini-batches of all completions, where they could be packed before the rewards were known."""
    seconds: float = 0.0
    """Time spent sampling."""
    staleness: int = 0
    """Optimizer steps between the policy that sampled and the one that trains."""


@dataclass(frozen=True)
class Experience:
    """The data of one training step. P groups, fewer than were sampled where some were dropped; G completions each."""

    groups: list[Group]
    mini_batches: list[Packed]
    all_advantages_PG: Tensor
    """Advantages of everything that was sampled, 0 for what was dropped: for the records."""
    advantages_PG: Tensor | None = None
    """Advantages of `groups`, to pack them again."""

    def real_batches(self) -> list[PackedBatch]:
        """Return the batches of all mini-batches that are not padding."""
        return [batch for part in self.mini_batches for batch in part.batches[: part.real]]


@dataclass
class ExperienceCollector:
    """Collects the experience of each step on this rank."""

    config: Config
    accelerator: Accelerator
    policy: Policy
    sampler: AsyncSampler
    prompts: PromptStream | StreamedPrompts
    rewards: RewardSum
    tokens_per_batch: int = 0
    """The config's, or less after memory ran out."""
    prompts_drawn: int = 0
    """Prompts drawn so far, over all ranks. It determines the next ones, so that a resumed run, and any number of
    ranks, sample the same."""

    def __post_init__(self) -> None:
        self.tokens_per_batch = self.tokens_per_batch or self.config.tokens_per_batch

    @phase("sampling")
    def sample(self, step: int, clock: Clock) -> Sampled:
        """Sample and score the completions of `step` (counted from 1).

        With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2), sample until prompts_per_step groups are not flat,
        or max_sampling_rounds have passed.
        """
        config = self.config
        dynamic, wanted = config.sampling.dynamic_sampling, config.prompts_per_step
        self.rewards.state = TrainerState(step - 1, config.steps, num_train_epochs=config.num_train_epochs)
        groups: list[Group] = []
        scores: list[Scores] = []
        kept: list[int] = []
        packed: list[Packed] | None = None
        found, rounds, seconds, version = 0, 0, 0.0, step - 1
        while rounds < (config.sampling.max_sampling_rounds if dynamic else 1) and found < wanted:
            count = math.ceil((wanted - found) * config.sampling.oversample) if dynamic else wanted
            batch = self.sampler.next_batch(lambda count=count: self._next_prompts(count), step - 1)  # type: ignore[misc]
            new, version = batch.groups, batch.version
            seconds += batch.seconds
            clock.lap("rollout")
            self.rewards.submit(new)
            if packed_before_rewards(config):  # the reference runs while the reward workers score
                packed = self._pack_with_references(new)
            clock.lap("reference")
            scores.append(self._collect_scores(new))
            clock.lap("reward")
            kept += [len(groups) + p for p in range(len(new)) if not dynamic or _varies(scores[-1].rewards_PG[p])]
            groups += new
            rounds += 1
            found = int(sum_over_ranks(self.accelerator, [float(len(kept))])[0])
        if dynamic and found > wanted:  # keep those drawn first, on whichever rank: the same for any number of ranks
            everyone = gather_rows(self.accelerator, [{"draw": groups[row].prompt.draw} for row in kept])
            taken = set(sorted(row["draw"] for row in everyone)[:wanted])
            kept = [row for row in kept if groups[row].prompt.draw in taken]
        return Sampled(groups, concatenate_scores(scores), kept, rounds, packed, seconds, step - 1 - version)

    @phase("learning")
    def compute_advantages(self, sampled: Sampled, beta: float, sums: Sums) -> Experience:
        """Select the completions to train on, compute their advantages, and pack them. `beta`: the KL coefficient."""
        objective = self.config.objective
        groups = [sampled.groups[row] for row in sampled.kept]
        rewards_PG = sampled.scores.rewards_PG[sampled.kept]
        by_reward = {name: values[sampled.kept] for name, values in sampled.scores.by_name.items()}
        packed = sampled.packed
        if objective.kl_in_reward:
            packed = self._pack_with_references(groups)
            rewards_PG = rewards_PG - beta * self._completion_kl(packed, rewards_PG, sums)
        chosen_PK = self._choose(groups, rewards_PG)
        rewards_PG = rewards_PG.gather(1, chosen_PK)
        by_reward = {name: values.gather(1, chosen_PK) for name, values in by_reward.items()}
        advantages_PG = self._estimate_advantages(rewards_PG, by_reward)
        if packed is None or subset_of(objective) is not None:
            groups = [
                Group(group.prompt, [group.completions[s] for s in chosen])
                for group, chosen in zip(groups, chosen_PK.tolist(), strict=True)
            ]
            packed = self._pack(groups, advantages_PG)
        packed = [part.with_advantages(advantages_PG) for part in packed]
        everything = torch.zeros_like(sampled.scores.rewards_PG)
        for row, chosen, advantages in zip(sampled.kept, chosen_PK, advantages_PG, strict=True):
            everything[row, chosen] = advantages
        return Experience(groups, packed, everything, advantages_PG)

    def limits(self) -> dict[str, int]:
        """Return the sizes that were lowered when memory ran out, for the checkpoint."""
        return {"tokens_per_batch": self.tokens_per_batch, **self.sampler.engine.state_dict()}

    def load_limits(self, limits: dict[str, int]) -> None:
        """Restore what `limits` returned."""
        self.tokens_per_batch = min(self.tokens_per_batch, limits.get("tokens_per_batch", self.tokens_per_batch))
        self.sampler.engine.load_state_dict(limits)

    def repack(self, experience: Experience, stepped: bool) -> Experience | None:
        """Pack the completions again with half of tokens_per_batch, from now on. Collective.

        Args:
            stepped: The policy has changed since it sampled: keep the old logprobs.

        Returns:
            None if neither smaller batches nor the sampler's memory are left.
        """
        if not self._halve(experience.groups):
            return None
        packed = self._pack(experience.groups, experience.advantages_PG)
        if stepped:  # the policy of the old logprobs is no more
            for part, before in zip(packed, experience.mini_batches, strict=True):
                part.old = regroup(before.old, before.batches[: before.real], part.batches, part.real)
        return replace(experience, mini_batches=packed)

    def _halve(self, groups: list[Group]) -> bool:
        """Halve tokens_per_batch; below FEW_TOKENS, free the sampler's memory first. Return whether one could be."""
        lengths = [len(group.prompt.token_ids) + len(one.token_ids) for group in groups for one in group.completions]
        smaller = max(self.tokens_per_batch // 2, max_over_ranks(self.accelerator, max(lengths, default=0)))
        last = not FEW_TOKENS <= smaller < self.tokens_per_batch
        if last and max_over_ranks(self.accelerator, self.sampler.give_up_memory()):
            return True
        before, self.tokens_per_batch = self.tokens_per_batch, smaller
        if smaller < before:
            log.info("out of memory in the update: tokens_per_batch is %d instead of %d", smaller, before)
        return smaller < before

    def _next_prompts(self, count: int) -> list[Prompt]:
        """Draw the next `count` prompts and return this rank's share."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        prompts = self.prompts.draws(self.prompts_drawn, count, rank, world)
        self.prompts_drawn += count
        return prompts

    def _collect_scores(self, groups: list[Group]) -> Scores:
        """Return the rewards of the submitted groups, with DAPO's overlong penalty as one more where it is set."""
        scores, cache = self.rewards.collect(), self.config.objective.soft_overlong_cache
        if not cache:
            return scores
        penalty_PG = overlong_penalty(lengths_of(groups), self.config.sampling.max_completion_length, cache)
        by_reward = {**scores.by_name, "overlong": penalty_PG}
        return replace(scores, rewards_PG=scores.rewards_PG + penalty_PG, by_name=by_reward)

    def _pack(self, groups: list[Group], advantages_PG: Tensor | None = None) -> list[Packed]:
        """Pack each mini-batch on the device. With advantages, completions that have no gradient are left out."""
        count = self.config.objective.mini_batches
        if count == 1:
            return [self._pack_one(groups, advantages_PG)]
        parts_PG = self._mini_batch_of(groups)
        return [self._pack_one(groups, advantages_PG, parts_PG == part) for part in range(count)]

    def _mini_batch_of(self, groups: list[Group]) -> Tensor:
        """Return the index [P, G] of each completion's mini-batch: all ranks' in the order of draws, in equal parts."""
        rows = gather_rows(self.accelerator, [{"draw": group.prompt.draw} for group in groups])
        place = {draw: index for index, draw in enumerate(sorted(row["draw"] for row in rows))}
        size = len(groups[0].completions) if groups else 1
        first_P1 = torch.tensor([place[group.prompt.draw] * size for group in groups], dtype=torch.long)[:, None]
        return (first_P1 + torch.arange(size)) * self.config.objective.mini_batches // max(1, len(rows) * size)

    def _pack_one(self, groups: list[Group], advantages_PG: Tensor | None, chosen_PG: Tensor | None = None) -> Packed:
        objective, policy = self.config.objective, self.policy
        into: Callable[..., list[PackedBatch]] = pack_rows
        if policy.uses_packed_attention:
            into = partial(pack, share_prompts=policy.shares_prompts)
        batches = into(
            groups,
            advantages_PG,
            max_tokens=self.tokens_per_batch,
            chosen_PG=chosen_PG,
            mask_truncated=objective.mask_truncated_completions,
            skip_flat=not (
                kl_in_loss(objective)
                or has_entropy_bonus(objective)
                or objective.top_entropy_quantile < 1
                or policy.has_router_loss
            ),
        )
        rounds, real = max_over_ranks(self.accelerator, len(batches)), len(batches)
        batches += [probe_batch(vocabulary_size(policy.model))] * (rounds - real)
        return Packed([batch.to(policy.device) for batch in batches], real)

    def _pack_with_references(self, groups: list[Group]) -> list[Packed]:
        """Pack the groups and compute the reference's logprobs, in smaller batches if memory runs out on a rank."""
        policy = self.policy
        while True:
            packed = self._pack(groups)
            error: BaseException | None = None
            try:
                packed = [replace(one, references=policy.reference_logprobs(one.batches)) for one in packed]
            except (RuntimeError, MemoryError) as caught:
                if not policy.survives(caught):
                    raise
                error = caught.with_traceback(None)
            error = policy.agree_on(error)
            if error is None:
                return packed
            policy.discard_gradients()
            if not self._halve(groups):
                raise error

    def _completion_kl(self, packed: list[Packed], rewards_PG: Tensor, sums: Sums) -> Tensor:
        """Return the KL estimate [P, G] of each completion, summed over its tokens. `rewards_PG` gives the shape."""
        kl = torch.zeros(rewards_PG.numel(), dtype=torch.float64)
        for batch, reference_N in (pair for part in packed for pair in part.real_references()):
            if reference_N is not None:
                kl_N = kl_estimate(batch.sampling_logprobs_N, reference_N, self.config.objective.kl_estimator)
                first_S = batch.lengths_S.cumsum(0) - batch.lengths_S
                kl[batch.completion_S.cpu()] = per_sequence(kl_N, batch)[first_S].cpu().double()
                sums.add("kl", kl_N.sum(), len(kl_N))
        return kl.reshape(rewards_PG.shape)

    def _choose(self, groups: list[Group], rewards_PG: Tensor) -> Tensor:
        """Return the indices [P, K] of the completions to train on: all of them, unless objective.subset is set."""
        objective, size = self.config.objective, rewards_PG.shape[1]
        name = subset_of(objective)
        if name is None or not len(groups):
            return torch.arange(size).expand(len(groups), -1)
        return SUBSETS.get(name)(rewards_PG, lengths_of(groups), objective.subset_size or max(2, size // 2))

    def _estimate_advantages(self, rewards_PG: Tensor, by_reward: dict[str, Tensor]) -> Tensor:
        """Return the advantages [P, G] of this rank's groups. The estimator sees the rewards of all ranks."""
        rank = self.accelerator.process_index
        rows = gather_rows(self.accelerator, [{"rank": rank, "rewards": rewards_PG, "by_reward": by_reward}])
        if not len(rewards_PG):
            return rewards_PG
        rows = [row for row in rows if len(row["rewards"])]
        offered = {
            "rewards_PG": torch.cat([row["rewards"] for row in rows]),
            "by_reward": {name: torch.cat([row["by_reward"][name] for row in rows]) for name in by_reward},
            "weights": {"overlong": 1.0, **self.rewards.weights},
            "scale": self.config.objective.scale_rewards,
        }
        before = sum(len(row["rewards"]) for row in rows if row["rank"] < rank)
        everyone = call_with_supported_args(ADVANTAGES.get(estimator_of(self.config.objective)), offered)
        return everyone[before : before + len(rewards_PG)]


def kl_in_loss(objective: ObjectiveConfig) -> bool:
    """Return whether the KL to the reference is a term of the loss."""
    return objective.beta > 0 and not objective.kl_in_reward


def packed_before_rewards(config: Config) -> bool:
    """Return whether the training set is known before the rewards: then the reference can run meanwhile."""
    return kl_in_loss(config.objective) and not config.sampling.dynamic_sampling and subset_of(config.objective) is None


def subset_of(objective: ObjectiveConfig) -> str | None:
    """Return objective.subset, or the one that loss_type implies."""
    return objective.subset or find_loss(objective.loss_type).implied.get("subset")


def estimator_of(objective: ObjectiveConfig) -> str:
    """Return the name of the advantage estimator: the config's own, else the one that loss_type implies, else group."""
    if objective.advantage_estimator:
        return objective.advantage_estimator
    if objective.multi_objective_aggregation == "normalize_then_sum":
        return "gdpo"
    return find_loss(objective.loss_type).implied.get("advantage_estimator", "group")


def lengths_of(groups: list[Group]) -> Tensor:
    """Return the numbers of sampled tokens [P, G], float64."""
    return torch.tensor([[len(c.sampled) for c in group.completions] for group in groups], dtype=torch.float64)


def _varies(rewards_G: Tensor) -> bool:
    known = rewards_G[~rewards_G.isnan()]
    return len(known) > 0 and bool(known.min() < known.max())
