"""The training loop: prompts -> completions -> rewards -> advantages -> packed batches -> clipped steps."""

import itertools
from pathlib import Path

import torch

from grpo.config.schema import Config
from grpo.errors import EngineError, Interrupted, NumericsError
from grpo.experience import Experience, Packed, kl_in_loss
from grpo.losses import Counts, find_loss, policy_loss
from grpo.objectives.correction import importance_correction, policy_term_mask, sequence_log_correction
from grpo.rollout.engine import correction_of
from grpo.rollout.logprob_mismatch import check_difference
from grpo.run.build import build_run
from grpo.run.high_entropy import high_entropy_masks
from grpo.run.state import Run
from grpo.run.step_metrics import rollout_rows, step_metrics
from grpo.runtime.device import torch_defaults
from grpo.runtime.distributed import max_over_ranks, sum_over_ranks
from grpo.runtime.oom import memory_advice, phase
from grpo.runtime.signals import Signals
from grpo.runtime.sums import Sums
from grpo.runtime.timing import Clock
from grpo.types import Group

MAX_SKIPPED = 3
"""Optimizer steps in a row that may be skipped because their loss or gradient is not finite."""


def train(config: Config) -> Path:
    """Train as `config` describes.

    Returns:
        The run directory.

    Raises:
        GrpoError: Its `exit_code` tells the kind of failure.
    """
    with Signals() as signals, memory_advice(config), torch_defaults():
        return train_run(build_run(config), signals)


def train_run(run: Run, signals: Signals) -> Path:
    """Train a run that is built, write final/, and close it. Returns the run directory."""
    signals.training = True
    try:
        training_loop(run, signals)
    except EngineError as error:
        raise run.save_on_engine_error(error) from error
    else:
        return run.finish()
    finally:
        run.close()


def training_loop(run: Run, signals: Signals, until: int | None = None) -> None:
    """Run GRPO: sample, score, compare, learn. The last step is `until`, by default that of the config."""
    config, collector = run.config, run.collector
    if run.start == 0 and config.eval_every:
        run.recorder.record(0, run.evaluate(0))
    until = until or config.steps
    for step in range(run.start + 1, until + 1):
        run.recorder.step_begins(step)
        clock, sums = Clock(run.accelerator.device), Sums()
        # 1. Sample G completions of each prompt. 2. Score them.
        sampled = collector.sample(step, clock)
        run.engine.free_memory()
        # 3. Compare each completion with the others of its group.
        experience = collector.compute_advantages(sampled, run.beta, sums)
        clock.lap("reference")
        # 4. Learn.
        update(run, experience, sums, clock)
        collector.sampler.wait()  # the weights that it reads are about to change
        clock.lap("rollout")
        run.sync_weights(step)
        clock.lap("update")
        # 5. Record the step.
        skipped = experience.real_batches() if sums.total("skipped") else []
        run.recorder.dump_failed_batches(step, sampled.groups, sampled.scores, skipped)
        curriculum = run.update_curriculum(sampled)
        measured = (sampled, experience.all_advantages_PG, sums, clock.laps, run.policy.entropy_bonus.coefficient)
        metrics = step_metrics(config, run.accelerator, *measured)
        metrics |= curriculum | run.policy.expert_metrics()
        run.adapt_beta(metrics)
        if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
            metrics |= run.evaluate(step)
        run.checkpointer.step_completed(step, run.beta)
        rows = rollout_rows(step, sampled.groups, sampled.scores, experience.all_advantages_PG)
        run.recorder.record(step, metrics, rows)
        check_skipped(run, step)
        difference = metrics.get("policy/sampling_logprob_difference", 0.0)  # not measured: no token was trained
        check_difference(run.engine, run.policy, config, step, difference, first=step == run.start + 1)
        # 6. Save, and stop if a signal or a callback has asked for it.
        signal = max_over_ranks(run.accelerator, signals.received)  # sent to one rank or all: they stop together
        stop, save = run.recorder.callbacks.requests()
        last = bool(signal) or stop or step == until
        if last or save or (config.save_every and step % config.save_every == 0):
            run.save(step, last=last)
        if signal and step < config.steps:
            raise Interrupted(signal, f"stopped by a signal after step {step} of {config.steps}. {run.resume_hint()}")
        if stop:
            break


@phase("learning")
def update(run: Run, experience: Experience, sums: Sums, clock: Clock) -> None:
    """Learn from one set of completions: num_iterations passes, each with an optimizer step on every mini-batch.

    Losses are sums, divided once by a count over all ranks. So the gradient does not depend on the packing. If memory
    runs out on a rank, all ranks pack smaller batches and start the mini-batch again. Token sums for the logs go to
    `sums`.
    """
    objective, counts = run.config.objective, count_tokens(run, experience.groups)
    for iteration, index in itertools.product(range(objective.num_iterations), range(objective.mini_batches)):
        while True:
            passed = Sums()
            error = run_batches(run, experience.mini_batches, index, counts, iteration == 0, passed, clock)
            if error is None:
                break
            run.policy.discard_gradients()
            smaller = run.collector.repack(experience, stepped=sums.count("grad_norm") > 0)
            if smaller is None:
                raise error
            experience = smaller
        sums.merge(passed)
        sums.add("learning_rate", run.policy.learning_rate, 1)
        if experience.mini_batches[index].batches:
            # If the loss is not finite on any rank, all ranks skip the step.
            usable = max_over_ranks(run.accelerator, passed.total("infinite") > 0) == 0
            sums.add("grad_norm", run.policy.step(usable), 1)
            sums.add("skipped", run.policy.skipped_in_a_row > 0)
            if objective.use_adaptive_entropy:
                entropy = [passed.total("step_entropy"), passed.count("step_entropy")]
                run.policy.entropy_bonus.update(*sum_over_ranks(run.accelerator, entropy))
        else:  # all groups are flat: a step would only apply weight decay and momentum
            run.policy.skip_step()
    sums.add("tokens_trained", sum(len(batch.tokens_N) for batch in experience.real_batches()))
    clock.lap("update")


def run_batches(
    run: Run, mini_batches: list[Packed], part: int, counts: Counts, first: bool, sums: Sums, clock: Clock
) -> BaseException | None:
    """Add the gradients of all batches of the mini-batch `part`. `first`: it is the first pass over it.

    Returns:
        None, or the error if memory ran out on any rank, on every rank.
    """
    policy, packed = run.policy, mini_batches[part]
    error = policy.count_expert_load(packed.batches)
    if error is not None:
        return error
    try:
        packed.high_entropy = high_entropy_masks(policy, packed, run.config.objective.top_entropy_quantile)
        if packed.batches:
            prepare(run, mini_batches, part, clock)
        for index in range(len(packed.batches)):
            sync = index == len(packed.batches) - 1 and not policy.batches_are_local
            run_batch(run, packed, index, counts, first, sync, sums)
    except (RuntimeError, MemoryError) as caught:
        if not policy.survives(caught):
            raise
        error = caught.with_traceback(None)  # whose frames hold the memory
    return policy.complete_gradients(error) if packed.batches else None


def prepare(run: Run, mini_batches: list[Packed], part: int, clock: Clock) -> None:
    """Compute what the mini-batch `part` needs beside the policy, where it is not there yet.

    Before the first optimizer step, these are the old logprobs of all other mini-batches. The first pass over the first
    one computes its own anyway.
    """
    packed = mini_batches[part]
    if not packed.references:
        packed.references = reference_logprobs(run, packed)
        clock.lap("reference")
    for later in mini_batches[1:]:
        if not later.old:
            later.old = run.policy.old_logprobs(later.batches)


def run_batch(run: Run, packed: Packed, index: int, counts: Counts, first: bool, sync: bool, sums: Sums) -> None:
    """Add the gradient of one batch."""
    config, policy, rollout, batch = run.config.objective, run.policy, run.config.rollout, packed.batches[index]
    with policy.accumulate(sync=sync):
        logprobs, entropies = policy.logprobs(batch)
        if index == len(packed.old):
            packed.old.append(logprobs.detach())
        old = packed.old[index]
        mode, bounds = correction_of(rollout), (rollout.correction_cap, rollout.correction_floor)
        correction = importance_correction(old, batch.sampling_logprobs_N, mode, *bounds, batch)
        loss = policy_loss(
            logprobs,
            old,
            packed.references[index],
            batch,
            find_loss(config.loss_type),
            counts,
            vars(config) | {"beta": run.beta, "entropy_coef": policy.entropy_bonus.applied},
            entropies_N=entropies,
            correction_N=correction,
            sequence_log_correction_N=sequence_log_correction(correction, batch, mode),
            mask_N=policy_term_mask(config, logprobs, batch, packed.high_entropy[index]),
        )
        total = loss.loss + policy.router_loss()
        policy.backward(total)
    counted = batch.weights_N != 0
    count = counted.sum()
    sums.add("infinite", ~torch.isfinite(total.detach()), 0)
    sums.add("loss", total.detach(), 0)
    sums.add("clipped", loss.clipped, count)
    if kl_in_loss(config):
        sums.add("kl", loss.kl, count)
    sums.add("step_entropy", torch.where(counted, entropies.detach(), 0.0).sum(), count)
    if first:
        difference = (old - batch.sampling_logprobs_N).abs()
        sums.add("entropy", torch.where(counted, entropies.detach(), 0.0).sum(), count)
        sums.add("mismatch", torch.where(counted, difference, 0.0).sum(), count)


def reference_logprobs(run: Run, packed: Packed) -> list[torch.Tensor | None]:
    """Return the reference logprobs of each batch for the KL in the loss. None for each without one."""
    if not kl_in_loss(run.config.objective):
        return [None] * len(packed.batches)
    return run.policy.reference_logprobs(packed.batches)


def count_tokens(run: Run, groups: list[Group]) -> Counts:
    """Count the tokens and completions of the loss over all ranks, per mini-batch: the mean over the mini-batches.

    So a token weighs the same in every mini-batch, and the mean of their gradients is that of a single one.
    """
    masked = run.config.objective.mask_truncated_completions
    lengths = [len(one.sampled) for group in groups for one in group.completions if one.ended or not masked]
    share = 1 / run.config.objective.mini_batches
    tokens, sequences = sum_over_ranks(run.accelerator, [float(sum(lengths)), float(len(lengths))])
    return Counts(tokens * share, sequences * share, run.config.sampling.max_completion_length)


def check_skipped(run: Run, step: int) -> None:
    """Raise NumericsError after too many skipped optimizer steps in a row."""
    if run.policy.skipped_in_a_row >= MAX_SKIPPED:
        raise NumericsError(
            f"{run.policy.skipped_in_a_row} optimizer steps in a row (the last one in step {step}) had a loss or "
            "gradient that is not finite; the weights are as they were before. Their batches are in "
            f"{run.run_dir / 'faults'}: lower optimizer.learning_rate, or resume from an older checkpoint"
        )
