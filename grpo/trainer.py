"""The loop: prompts -> completions -> rewards -> advantages -> packed batches -> clipped steps. train(config), and nothing else."""

import time
from pathlib import Path

import torch

from grpo.advantages import group_advantages
from grpo.config import Config
from grpo.distributed import max_over_ranks, sum_over_ranks
from grpo.evaluation import evaluate
from grpo.metrics import Sums
from grpo.objective import OBJECTIVES, Counts, clipped_loss
from grpo.packing import PackedBatch, pack
from grpo.policy import probe_batch
from grpo.rewards import Scores
from grpo.setup import Run, prepare
from grpo.summary import rollout_rows, step_metrics
from grpo.types import Group, SamplingPlan


def train(config: Config) -> Path:
    """Train as `config` says; -> the run directory. Raises GrpoError, whose exit_code says what went wrong."""
    run = prepare(config)
    try:
        loop(run)
        return run.finish()
    finally:
        run.display.close()  # a progress bar hides the cursor: give it back, whatever happened


def loop(run: Run) -> None:
    """What GRPO is: sample, score, compare, learn."""
    config, accelerator = run.config, run.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    plan = SamplingPlan(
        config.sampling.num_generations,
        config.sampling.max_completion_length,
        config.sampling.temperature,
        config.seed,
    )
    if run.start == 0 and config.eval_every:
        run.record(0, held_out(run))
    for step in range(run.start, config.steps):
        clock = Clock()
        # 1. Sample G completions of each prompt.
        prompts = run.stream.take(step, config.prompts_per_step, rank, world)
        with accelerator.autocast():
            groups = run.engine.generate(prompts, plan)
        clock.lap("rollout")
        # 2. Score them, and compare each with its siblings.
        scores = run.score(groups)
        advantages_PG = advantages_of(run, scores)
        clock.lap("reward")
        # 3. Lay them end to end, and 4. learn.
        batches = pack(
            groups,
            advantages_PG,
            max_tokens=config.tokens_per_batch,
            mask_truncated=config.objective.mask_truncated_completions,
            skip_flat=config.objective.beta == 0,  # without a KL term, a zero advantage means a zero gradient
        )
        sums = update(run, batches, groups, clock)
        clock.lap("update")
        # 5. Write it down.
        done = step + 1
        metrics = step_metrics(run, groups, scores, advantages_PG, sums, clock.laps)
        if config.eval_every and (done % config.eval_every == 0 or done == config.steps):
            metrics |= held_out(run)
        run.record(done, metrics, rollout_rows(done, groups, scores, advantages_PG))
        if done == config.steps or (config.save_every and done % config.save_every == 0):
            run.save(done)


def update(run: Run, batches: list[PackedBatch], groups: list[Group], clock: "Clock") -> Sums:
    """num_iterations optimizer steps on one set of completions; -> token sums for the logs.

    Losses are sums, divided once by a count over all ranks, so the gradient does not depend on how tokens were packed.
    """
    config, policy, objective = run.config.objective, run.policy, OBJECTIVES.get(run.config.objective.loss_type)
    counted = [
        len(completion.token_ids)
        for group in groups
        for completion in group.completions
        if completion.ended or not config.mask_truncated_completions
    ]
    tokens, sequences = sum_over_ranks(run.accelerator, [float(sum(counted)), float(len(counted))])
    denominator = max(1.0, objective.denominator(Counts(tokens, sequences, run.config.sampling.max_completion_length)))
    sums = Sums()
    sums.add("tokens_trained", sum(len(batch.tokens_N) for batch in batches))
    # Every rank goes through the model equally often: a rank with less to train joins with an empty-weighted batch.
    rounds = max_over_ranks(run.accelerator, len(batches))
    real = len(batches)
    batches = [batch.to(policy.device) for batch in batches]
    batches += [probe_batch(policy.model.config.vocab_size).to(policy.device)] * (rounds - real)
    references = [policy.reference_logprobs(batch) for batch in batches]
    clock.lap("reference")
    old: list[torch.Tensor] = []  # the policy that sampled: what the first pass computes anyway
    for iteration in range(config.num_iterations):
        for index, batch in enumerate(batches):
            with policy.accumulate(sync=index == rounds - 1):
                logprobs, entropies = policy.logprobs(batch)
                if iteration == 0:
                    old.append(logprobs.detach())
                loss = clipped_loss(
                    logprobs,
                    old[index],
                    references[index],
                    batch,
                    objective,
                    beta=config.beta,
                    epsilon=config.epsilon,
                    epsilon_high=config.epsilon_high,
                    kl_estimator=config.kl_estimator,
                )
                policy.backward(loss.loss / denominator)
            count = float((batch.weights_N != 0).sum())
            sums.add("loss", loss.loss.detach() / denominator, 0)
            sums.add("kl", loss.kl, count)
            sums.add("clipped", loss.clipped, count)
            if iteration == 0:
                shown = batch.weights_N != 0
                sums.add("entropy", entropies[shown].sum(), count)
                sums.add("mismatch", (logprobs.detach() - batch.sampling_logprobs_N)[shown].abs().sum(), count)
        sums.add("learning_rate", policy.learning_rate, 1)
        if rounds:
            sums.add("grad_norm", policy.step(), 1)
        else:  # every group was flat: nothing to learn, and no step that would only decay weights and momentum
            policy.scheduler.step()
    return sums


def advantages_of(run: Run, scores: Scores) -> torch.Tensor:
    """[P, G]; scale_rewards batch needs the rewards of all ranks, the other two only their own."""
    scale = run.config.objective.scale_rewards
    if scale != "batch" or run.accelerator.num_processes == 1:
        return group_advantages(scores.rewards_PG, scale=scale)
    parts = [None] * run.accelerator.num_processes
    torch.distributed.all_gather_object(parts, scores.rewards_PG)
    before = sum(len(part) for part in parts[: run.accelerator.process_index])  # type: ignore[arg-type, misc]
    everyone = group_advantages(torch.cat(parts), scale="batch")  # type: ignore[arg-type]
    return everyone[before : before + len(scores.rewards_PG)]


def held_out(run: Run) -> dict[str, float]:
    """Greedy accuracy and format on the held-out prompts; nothing where there are none."""
    if not run.held_out:
        return {}
    return evaluate(
        run.engine,
        run.held_out,
        run.accelerator,
        max_completion_length=run.config.sampling.max_completion_length,
        prose=run.config.data.extractor == "quoted_terms",
    ).metrics


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
