"""The loop: prompts -> completions -> rewards -> advantages -> packed batches -> clipped steps. train(config), and nothing else."""

from pathlib import Path

import torch

from grpo.config.schema import Config, correction_of
from grpo.data.curriculum import Curriculum
from grpo.errors import EngineError, Interrupted, NumericsError
from grpo.experience import Experience, Sampled, compute_advantages, kl_in_loss, packed, sample
from grpo.kl import adapted_beta
from grpo.losses import Counts, find_objective, importance_correction, policy_loss
from grpo.packing import PackedBatch
from grpo.rollout.evaluation import evaluate
from grpo.rollout.logprob_mismatch import check_difference
from grpo.run.build import prepare
from grpo.run.state import Run
from grpo.run.step_metrics import rollout_rows, step_metrics
from grpo.runtime.distributed import gather_rows, max_over_ranks, sum_over_ranks
from grpo.runtime.oom import memory_advice
from grpo.runtime.signals import Signals
from grpo.runtime.sums import Sums
from grpo.runtime.timing import Clock

MAX_SKIPPED = 3
"""Optimizer steps in a row that may be skipped because their loss or gradient is not finite."""


def train(config: Config) -> Path:
    """Train as `config` says; -> the run directory. Raises GrpoError, whose exit_code says what went wrong."""
    with Signals() as signals, memory_advice(config):
        run = prepare(config)
        signals.training = True
        try:
            loop(run, signals)
        except EngineError as error:
            raise run.save_on_engine_error(error) from error
        else:
            return run.finish()
        finally:
            run.close()


def loop(run: Run, signals: Signals) -> None:
    """What GRPO is: sample, score, compare, learn."""
    config = run.config
    if run.start == 0 and config.eval_every:
        run.record(0, held_out(run, 0))
    for step in range(run.start, config.steps):
        clock, sums = Clock(), Sums()
        # 1. Sample G completions of each prompt, and 2. score them.
        sampled = sample(run, step, clock)
        # 3. Compare each with its siblings.
        experience = compute_advantages(run, sampled, sums)
        clock.lap("reference")
        # 4. Lay them end to end, and 5. learn.
        batches = update(run, experience, sums, clock)
        done = step + 1
        run.ahead.settle()  # what was being sampled meanwhile: the weights that it reads are about to change
        clock.lap("rollout")
        run.follow(done)
        clock.lap("update")
        # 6. What was too easy, or hopeless, is left out for a while. 7. Write it down.
        run.dump_failed_batches(done, sampled.groups, sampled.scores, batches if sums.total("skipped") else [])
        measured = measure(run, sampled)
        metrics = step_metrics(run, sampled, experience, sums, clock.laps)
        metrics |= measured
        adapt(run, metrics)
        if config.eval_every and (done % config.eval_every == 0 or done == config.steps):
            metrics |= held_out(run, done)
        run.record(done, metrics, rollout_rows(done, sampled.groups, sampled.scores, experience.all_advantages_PG))
        check_skipped(run, done)
        check_difference(run.engine, run.policy, config.rollout, done, metrics["policy/sampling_logprob_difference"])
        signal = max_over_ranks(run.accelerator, signals.received)  # to one rank or all: they leave together
        if signal or done == config.steps or (config.save_every and done % config.save_every == 0):
            run.save(done, needed=bool(signal) or done == config.steps)
        if signal and done < config.steps:
            raise Interrupted(signal, f"stopped by a signal after step {done} of {config.steps}. {run.how_to_go_on()}")


def update(run: Run, experience: Experience, sums: Sums, clock: "Clock") -> list[PackedBatch]:
    """num_iterations optimizer steps on one set of completions; token sums for the logs go to `sums`. -> what was learned from.

    Losses are sums, divided once by a count over all ranks, so the gradient does not depend on how tokens were packed.
    """
    config, policy, objective = run.config.objective, run.policy, find_objective(run.config.objective.loss_type)
    settings = vars(config) | {"beta": run.progress.beta}
    in_loss = kl_in_loss(config)
    batches, real = packed(run, experience.groups, experience.advantages_PG)
    rounds = len(batches)
    counted = [
        len(completion.token_ids)
        for group in experience.groups
        for completion in group.completions
        if completion.ended or not config.mask_truncated_completions
    ]
    tokens, sequences = sum_over_ranks(run.accelerator, [float(sum(counted)), float(len(counted))])
    counts = Counts(tokens, sequences, run.config.sampling.max_completion_length)
    sums.add("tokens_trained", sum(len(batch.tokens_N) for batch in batches[:real]))
    references = experience.references or (policy.reference_logprobs(batches) if in_loss else [None] * rounds)
    clock.lap("reference")
    finite = True
    old: list[torch.Tensor] = []  # the policy as it was before this step: what the first pass computes anyway
    for iteration in range(config.num_iterations):
        for index, batch in enumerate(batches):
            with policy.accumulate(sync=index == rounds - 1):
                logprobs, entropies = policy.logprobs(batch)
                if iteration == 0:
                    old.append(logprobs.detach())
                loss = policy_loss(
                    logprobs,
                    old[index],
                    references[index],
                    batch,
                    objective,
                    counts,
                    settings,
                    entropies_N=entropies,
                    correction_N=importance_correction(
                        old[index],
                        batch.sampling_logprobs_N,
                        correction_of(run.config.rollout),
                        run.config.rollout.correction_cap,
                    ),
                )
                policy.backward(loss.loss)
            finite = finite and bool(torch.isfinite(loss.loss))
            count = float((batch.weights_N != 0).sum())
            sums.add("loss", loss.loss.detach(), 0)
            if in_loss:
                sums.add("kl", loss.kl, count)
            sums.add("clipped", loss.clipped, count)
            if iteration == 0:
                shown = batch.weights_N != 0
                sums.add("entropy", entropies[shown].detach().sum(), count)
                sums.add("mismatch", (logprobs.detach() - batch.sampling_logprobs_N)[shown].abs().sum(), count)
        sums.add("learning_rate", policy.learning_rate, 1)
        if rounds:
            # A rank whose own loss is not finite speaks for all of them: the step changes nothing anywhere.
            usable = max_over_ranks(run.accelerator, not finite) == 0
            sums.add("grad_norm", policy.step(usable), 1)
            sums.add("skipped", policy.skipped_in_a_row > 0)
        else:  # every group was flat: nothing to learn, and no step that would only decay weights and momentum
            policy.skip_step()
    clock.lap("update")
    return batches[:real]


def adapt(run: Run, metrics: dict[str, float]) -> None:
    """Where kl_target is set: move beta so that policy/kl comes nearer to it. Every rank has the same metrics."""
    objective = run.config.objective
    if objective.kl_target is None:
        return
    metrics["policy/beta"] = run.progress.beta
    completions = run.config.prompts_per_step * run.config.sampling.num_generations
    run.progress.beta = adapted_beta(
        run.progress.beta, metrics["policy/kl"], objective.kl_target, completions, objective.kl_horizon
    )


def measure(run: Run, sampled: Sampled) -> dict[str, float]:
    """Tell the curriculum, where there is one, what every rank's groups earned; -> its metrics."""
    if not isinstance(run.stream, Curriculum):
        return {}
    means = sampled.scores.by_name[str(run.config.curriculum.reward)].nanmean(dim=1).tolist()
    mine = [{"draw": group.prompt.draw, "mean": mean} for group, mean in zip(sampled.groups, means, strict=True)]
    everyone = gather_rows(run.accelerator, mine)
    run.stream.update([(row["draw"], row["mean"]) for row in everyone if row["mean"] == row["mean"]])
    return run.stream.metrics()


def check_skipped(run: Run, step: int) -> None:
    """Raises NumericsError after too many optimizer steps in a row that had to be skipped."""
    if run.policy.skipped_in_a_row >= MAX_SKIPPED:
        raise NumericsError(
            f"{run.policy.skipped_in_a_row} optimizer steps in a row (the last one in step {step}) had a loss or gradient "
            f"that is not finite; the weights are as they were before. Their batches are in {run.run_dir / 'faults'}: "
            f"lower optimizer.learning_rate, or resume from an older checkpoint"
        )


def held_out(run: Run, step: int) -> dict[str, float]:
    """Greedy accuracy and format on the held-out prompts, and every item written down; nothing where there are none, and where
    the engine fails: the step before is whole and can be recorded, and the next one's samples will fail like it."""
    if not run.held_out:
        return {}
    try:
        found = evaluate(
            run.engine,
            run.held_out,
            run.accelerator,
            max_completion_length=run.config.sampling.max_completion_length,
            prose=run.config.data.extractor == "quoted_terms",
        )
    except EngineError as error:
        run.unmeasured = error
        return {}
    if run.tracker is not None:
        run.tracker.log_evaluation(step, found.rows)
    return found.metrics
