"""Forecast of a run: some groups and steps of the real thing, discarded -> 90 % intervals for the next steps.

    sample and score groups with the model as it is   ->  pass rates, flat groups, lengths
    train the first of them, and some more steps      ->  seconds, memory, drift
    discard all of it                                 ->  nothing is saved

The prompts are those after the end of the run, so no completion of the probe is one of the run.
"""

import dataclasses
import logging
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from grpo.config.schema import Config
from grpo.data.streaming import StreamedPrompts
from grpo.errors import ConfigError
from grpo.experience import Experience, Sampled
from grpo.rewards.registry import reward_labels
from grpo.run.build import build_run
from grpo.run.checkpointer import find_checkpoint
from grpo.run.state import Run
from grpo.run.step_metrics import rollout_rows, step_metrics
from grpo.runtime.device import free_memory, is_cpu, torch_defaults
from grpo.runtime.env import env_count
from grpo.runtime.oom import memory_advice
from grpo.runtime.sums import Sums
from grpo.runtime.timing import Clock
from grpo.tools.forecast_advice import advice
from grpo.tools.forecast_result import Forecast, NextStep, PromptRate
from grpo.tools.forecast_statistics import (
    OWN_DEVICE,
    SHARED_CPU,
    Interval,
    Trend,
    flat_by_size,
    next_seconds,
    proportion,
)
from grpo.tracking.run_dir import choose_run_dir
from grpo.trainer import update

log = logging.getLogger(__name__)

SAMPLING_SHARE = 1 / 3
"""Share of the minutes after which no more groups are sampled before the first step."""
MIN_GROUPS, MAX_GROUPS = 4, 128
MAX_STEPS = 12
HORIZON = 5
"""Steps that are forecast one by one."""
TOTAL = "sum of the rewards"
SHOWN_SIZES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Observed:
    """One group of the probe."""

    step: int
    """Counted from 1, the policy as it is now."""
    draw: int
    question: str
    totals: list[float]
    values: list[float]
    """Of the reward that decides what a pass is."""
    lengths: list[int]
    ended: list[bool]
    texts: int
    """Different completions."""
    flat: bool


@dataclass
class Probe:
    """All measurements of a probe."""

    groups: list[Observed] = field(default_factory=list)
    batches_sampled: int = 0
    """Times that the groups of a step were sampled."""
    seconds: list[float] = field(default_factory=list)
    """Of each step that was trained."""
    phases: list[dict[str, float]] = field(default_factory=list)
    peak_gib: float = 0.0
    free_gib: float = 0.0
    """Memory that could still be allocated after the last step."""
    batches: list[int] = field(default_factory=list)
    """Tokens of each batch of the update."""
    steps_left: int = 0
    took: float = 0.0
    """Seconds of the probe without loading."""
    on_cpu: bool = True

    @property
    def now(self) -> list[Observed]:
        """The groups that the policy wrote as it is now."""
        return [group for group in self.groups if group.step == 1]


def forecast(config: Config, minutes: float, flat_share: float) -> Forecast:
    """Sample and train a few steps of a run, discard them, and forecast the next ones.

    Args:
        config: The run. With `resume`, the forecast is of the steps after the checkpoint.
        minutes: Time for sampling and training; loading comes on top, and at least one step is trained.
        flat_share: The share of flat groups to stay below.

    Raises:
        ConfigError: As in training, or there are several processes.
    """
    if not minutes > 0:
        raise ConfigError(f"--probe {minutes:g}: give the minutes to measure for, such as 2")
    if not 0 < flat_share < 1:
        raise ConfigError(f"--flat_share {flat_share:g}: give a share between 0 and 1, such as 0.2")
    if env_count("WORLD_SIZE", 1) > 1:
        raise ConfigError(
            "--probe measures one process, and this is one of several: start it with python launch/check.py"
        )
    return summarize(probe(config, 60 * minutes), config, flat_share)


def probe(config: Config, seconds: float) -> Probe:
    """Measure for about `seconds`. The run directory is a temporary one."""
    found = Probe()
    checkpoint = find_checkpoint(config, choose_run_dir(config, datetime.now()))
    with tempfile.TemporaryDirectory() as temporary, memory_advice(config), torch_defaults():
        run = build_run(_discarded(config, Path(temporary) / "run", checkpoint))
        try:
            _use_other_prompts(run)
            _measure(run, seconds, found)
        finally:
            run.close()
    return found


def _discarded(config: Config, run_dir: Path, checkpoint: Path | None) -> Config:
    """Return the config without anything that is written, evaluated or called back."""
    tracking = dataclasses.replace(config.tracking, report_to=[], report=False, log_completions=False)
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        resume=str(checkpoint) if checkpoint else None,
        eval_every=0,
        save_every=0,
        load_best_model_at_end=False,
        callbacks=[],
        tracking=tracking,
    )


def _use_other_prompts(run: Run) -> None:
    """Draw the prompts after the last step of the run. A stream goes forward only: it gets other random numbers."""
    collector, sampling = run.collector, run.config.sampling
    if isinstance(collector.prompts, StreamedPrompts):
        collector.sampler.plan = dataclasses.replace(collector.sampler.plan, seed=run.config.seed + 1)
        return
    rounds = sampling.max_sampling_rounds if sampling.dynamic_sampling else 1
    collector.prompts_drawn += (run.config.steps - run.start) * run.config.prompts_per_step * rounds


def _measure(run: Run, seconds: float, found: Probe) -> None:
    began = time.perf_counter()
    first = run.start + 1
    found.steps_left, found.on_cpu = run.config.steps - run.start, is_cpu(run.accelerator.device)
    clock, sums = Clock(run.accelerator.device), Sums()
    sampled, experience = _sample(run, first, clock, sums, found, at=1)
    laps = dict(clock.laps)
    while len(found.groups) < MAX_GROUPS:
        passed = time.perf_counter() - began
        rounds = len(found.groups) / max(1, len(sampled.groups))
        if len(found.groups) >= MIN_GROUPS and passed * (1 + 1 / rounds) > SAMPLING_SHARE * seconds:
            break
        _sample(run, first, Clock(), Sums(), found, at=1)
    for step in range(first, first + min(MAX_STEPS, found.steps_left)):
        left = seconds - (time.perf_counter() - began)
        if found.seconds and left < found.seconds[-1]:
            break
        clock = Clock(run.accelerator.device)
        if step > first:
            laps, sums = {}, Sums()
            sampled, experience = _sample(run, step, clock, sums, found, at=step - run.start)
        _train(run, step, sampled, experience, sums, clock, laps, found)
    found.free_gib = free_memory(run.accelerator.device) / 2**30
    found.took = time.perf_counter() - began


def _sample(run: Run, step: int, clock: Clock, sums: Sums, found: Probe, at: int) -> tuple[Sampled, Experience]:
    """Sample and score one step's groups, and note them."""
    sampled = run.collector.sample(step, clock)
    run.engine.free_memory()
    experience = run.collector.compute_advantages(sampled, run.beta, sums)
    clock.lap("reference")
    found.batches_sampled += 1
    name = passing_reward(run.config)
    rows = rollout_rows(step, sampled.groups, sampled.scores, experience.all_advantages_PG)
    for start in range(0, len(rows), size := len(sampled.groups[0].completions)):
        group = rows[start : start + size]
        found.groups.append(
            Observed(
                at,
                group[0]["draw"],
                group[0]["prompt"],
                [row["reward"] for row in group],
                [row["reward"] if name == TOTAL else row["rewards"][name] for row in group],
                [row["length"] for row in group],
                [row["ended"] for row in group],
                len({row["completion"] for row in group}),
                all(row["advantage"] == 0 for row in group),
            )
        )
    return sampled, experience


def _train(
    run: Run,
    step: int,
    sampled: Sampled,
    experience: Experience,
    sums: Sums,
    clock: Clock,
    before: dict[str, float],
    found: Probe,
) -> None:
    """Train one step as grpo/trainer.py does. `before`: seconds by phase that the step took before `clock` started."""
    update(run, experience, sums, clock)
    run.collector.sampler.wait()
    clock.lap("rollout")
    run.sync_weights(step)
    clock.lap("update")
    run.update_curriculum(sampled)
    laps = {name: before.get(name, 0.0) + clock.laps.get(name, 0.0) for name in before | clock.laps}
    metrics = step_metrics(run.config, run.accelerator, sampled, experience.all_advantages_PG, sums, laps)
    run.adapt_beta(metrics)
    run.checkpointer.step_completed(step, run.beta)
    found.seconds.append(metrics["time/step"])
    found.phases.append(laps)
    found.peak_gib = metrics["memory/peak_gib"]
    found.batches += [len(batch.input_ids_T) for batch in experience.real_batches()]


def passing_reward(config: Config) -> str:
    """Return the label of the reward that decides what a pass is: curriculum.reward, or the one of largest weight."""
    if not config.rewards:  # an environment pays
        return TOTAL
    name = config.curriculum.reward or max(config.rewards, key=lambda reward: abs(config.rewards[reward]))
    return reward_labels(config.rewards)[name]


def summarize(found: Probe, config: Config, flat_share: float) -> Forecast:
    """Return the forecast that the measurements of a probe support."""
    now = found.now
    best = max((value for group in found.groups for value in group.values if value == value), default=0.0)
    threshold = best / 2

    def passed(group: Observed) -> int:
        return sum(value >= threshold for value in group.values) if best > 0 else 0

    rates = [passed(group) / len(group.values) for group in now]
    trained = [group.step for group in found.groups]
    lengths = Trend(trained, [_mean(group.lengths) for group in found.groups])
    flat = Trend(trained, [float(group.flat) for group in found.groups])
    all_lengths = sorted(length for group in now for length in group.lengths)
    ended = sorted(n for group in now for n, end in zip(group.lengths, group.ended, strict=True) if end)
    groups_per_step = round(len(found.groups) / found.batches_sampled)
    later = found.seconds[1:] or found.seconds
    machine, left = SHARED_CPU if found.on_cpu else OWN_DEVICE, found.steps_left
    first_seconds, next_step = next_seconds(found.seconds[:1], 1, machine), next_seconds(later, 1, machine)
    rest = next_seconds(later, max(1, left - 1), machine)
    kinds = {"none": [r == 0 for r in rates], "up to half": [0 < r <= 0.5 for r in rates]}
    kinds |= {"more than half": [0.5 < r < 1 for r in rates], "all": [r == 1 for r in rates]}
    by_size = flat_by_size([group.totals for group in now], flat_share, _sizes(config))
    limit = float(config.sampling.max_completion_length)
    result = Forecast(
        seconds_measured=found.took,
        groups=len(found.groups),
        groups_now=len(now),
        completions=sum(len(group.lengths) for group in found.groups),
        trained_steps=len(found.seconds),
        passing=passing_reward(config),
        threshold=threshold,
        prompts=[PromptRate(g.draw, g.question, passed(g), len(g.values)) for g in now],
        pass_rate=Trend([1] * len(now), rates).mean(1, bounds=(0, 1)),
        pass_rates={name: proportion(sum(hits), len(now)) for name, hits in kinds.items()},
        flat=proportion(sum(group.flat for group in now), len(now)),
        flat_passed=sum(group.flat and passed(group) == len(group.values) for group in now),
        flat_failed=sum(group.flat and passed(group) == 0 for group in now),
        different_texts=_mean([group.texts / len(group.lengths) for group in now]),
        length=Trend([1] * len(now), [_mean(g.lengths) for g in now]).mean(1, bounds=(0, limit)),
        length_limit=config.sampling.max_completion_length,
        longest_ended=ended[-1] if ended else 0,
        length_median=all_lengths[len(all_lengths) // 2],
        length_95=all_lengths[min(len(all_lengths) - 1, len(all_lengths) * 95 // 100)],
        truncated=_truncated(now),
        seconds=next_step,
        first_seconds=first_seconds,
        step_seconds=found.seconds,
        phases={name: _mean([laps.get(name, 0.0) for laps in found.phases]) for name in found.phases[-1]},
        steps_left=left,
        hours=Interval(
            *((first + (left - 1) * more) / 3600 for first, more in zip(_ends(first_seconds), _ends(rest), strict=True))
        ),
        peak_gib=found.peak_gib,
        free_gib=found.free_gib,
        largest_batch=max(found.batches, default=0),
        batches_per_step=len(found.batches) / len(found.seconds),
        next_steps=[
            NextStep(
                step=step,
                seconds=first_seconds if step == 1 else next_step,
                flat=flat.share(step, groups_per_step),
                length=lengths.mean(step, groups_per_step, (0, limit)),
            )
            for step in range(1, min(HORIZON, left) + 1)
        ],
        flat_share=flat_share,
        flat_by_size=by_size.shares,
        smallest_size=by_size.smallest,
    )
    result.advice = advice(result, config, on_cpu=found.on_cpu)
    return result


def _sizes(config: Config) -> list[int]:
    return sorted({*SHOWN_SIZES, config.sampling.num_generations})


def _truncated(groups: list[Observed]) -> Interval:
    """Return the share of completions that were cut off. Those of one prompt are alike: the groups are the sample."""
    shares = [1 - sum(group.ended) / len(group.ended) for group in groups]
    if min(shares) == max(shares):
        return proportion(sum(shares), len(shares))
    return Trend([1] * len(shares), shares).mean(1, bounds=(0, 1))


def _ends(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values)
