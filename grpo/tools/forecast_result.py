"""The result of a forecast. Its fields are keys of `grpo check --probe --output CHECK.json`."""

from dataclasses import dataclass, field

from grpo.tools.forecast_statistics import Interval


@dataclass(frozen=True)
class PromptRate:
    """Passes of one prompt."""

    draw: int
    question: str
    passed: int
    completions: int


@dataclass(frozen=True)
class NextStep:
    """90 % intervals of one of the next steps, as its row of metrics.jsonl will have it."""

    step: int
    """Counted from now."""
    seconds: Interval
    """time/step"""
    flat: Interval
    """reward/zero_std_fraction"""
    length: Interval
    """rollout/length_mean"""


@dataclass
class Forecast:
    """Measurements of a probe, with 90 % intervals. "Now" is the policy before its first step."""

    seconds_measured: float
    groups: int
    groups_now: int
    """Groups that the policy wrote as it is now; the others are of the steps that were trained."""
    completions: int
    trained_steps: int
    """Training steps that were measured, and discarded."""
    passing: str
    """The reward that decides what a pass is."""
    threshold: float
    """A completion passes with at least this much of it: half of the most that any earned."""
    prompts: list[PromptRate]
    pass_rate: Interval
    pass_rates: dict[str, Interval]
    """Share of prompts of which none, up to half, more than half, or all completions pass."""
    flat: Interval
    """Share of flat groups now."""
    flat_passed: int
    flat_failed: int
    """Flat groups whose completions all pass, or all fail."""
    different_texts: float
    """Share of the completions of a group that are different texts."""
    length: Interval
    length_limit: int
    """sampling.max_completion_length"""
    longest_ended: int
    """Tokens of the longest completion that was not cut off."""
    length_median: int
    length_95: int
    truncated: Interval
    seconds: Interval
    """Of a step after the first one."""
    first_seconds: Interval
    step_seconds: list[float]
    """Of each step that was measured."""
    phases: dict[str, float]
    """Mean seconds by phase."""
    steps_left: int
    hours: Interval
    """To the end of the config, without evaluations and checkpoints, while completions keep their length."""
    peak_gib: float
    """Most memory that the process held in the steps that were measured."""
    free_gib: float
    """Memory that was still free after them."""
    largest_batch: int
    """Tokens of the largest batch of an update."""
    batches_per_step: float
    next_steps: list[NextStep]
    flat_share: float
    """The share of flat groups to stay below."""
    flat_by_size: dict[int, Interval]
    """Expected share of flat groups by sampling.num_generations."""
    smallest_size: Interval | None
    """Smallest sampling.num_generations whose share is below `flat_share`."""
    advice: list[str] = field(default_factory=list)
    """Recommended changes, each with its reason."""
