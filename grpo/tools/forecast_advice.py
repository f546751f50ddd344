"""Advice: the measurements of a probe -> settings to change, each with its reason. docs/forecast.md lists the rules."""

from grpo.config.schema import Config
from grpo.tools.forecast_result import Forecast

OFTEN_CUT = 0.1
"""Share of completions cut off from which sampling.max_completion_length is too short."""
FEW_TEXTS = 0.5
"""Share of different texts in a group, below which sampling is narrow."""
MUCH_MEMORY, LITTLE_MEMORY = 0.85, 0.5
"""Shares of the memory that the peak takes."""
MANY_BATCHES = 4
LARGE_STEP = 4
"""Factor of sampling.num_generations from which other prompts are cheaper."""


def advice(found: Forecast, config: Config, *, on_cpu: bool) -> list[str]:
    """Return "key value: reason" for each change that the probe supports."""
    return [*_groups(found, config), *_lengths(found), *_memory(found, config, on_cpu=on_cpu)]


def _groups(found: Forecast, config: Config) -> list[str]:
    """Flat groups: a larger G, a wider sampler, or other prompts."""
    sampling, lines = config.sampling, []
    flat, size = found.flat, sampling.num_generations
    if found.pass_rate.value == 0 and found.flat.value == 1:
        tried = sum(prompt.completions for prompt in found.prompts)
        return [
            f"other prompts or an easier reward: none of {tried} completions passed and every group was flat; more "
            "completions of the same prompts find nothing to compare"
        ]
    if flat.value < found.flat_share:
        return []
    share = f"{flat.value:.0%} of the groups are flat now, {found.flat_share:.0%} are wanted"
    smallest = found.smallest_size
    if smallest is not None and size < smallest.value <= LARGE_STEP * size:
        lines.append(
            f"sampling.num_generations {smallest.value:.0f} ({smallest.low:.0f} to {smallest.high:.0f}): {share}"
        )
    if found.different_texts < FEW_TEXTS and sampling.temperature < 1:
        lines.append(
            f"sampling.temperature 1.0: only {found.different_texts:.0%} of the completions of a prompt are different "
            f"texts at {sampling.temperature:g}, and {share}"
        )
    if found.flat_passed + found.flat_failed and not lines:
        solved, hopeless = found.flat_passed, found.flat_failed
        kind = f"{solved} prompts were passed and {hopeless} failed by all completions, of {found.groups_now}"
        epochs = config.curriculum.reward is None and config.prompts_per_step > 1
        if not sampling.dynamic_sampling:
            lines.append(f"sampling.dynamic_sampling true: {kind}; other prompts take the place of flat groups")
        if epochs:
            lines.append(
                f"curriculum.reward {found.passing}: {kind}; in later epochs they are left out (only where the run has "
                "more than one epoch)"
            )
    return lines


def _lengths(found: Forecast) -> list[str]:
    limit = found.length_limit
    if found.truncated.value > OFTEN_CUT:
        return [
            f"sampling.max_completion_length {2 * limit}: {found.truncated.value:.0%} of the completions are cut off "
            f"at {limit} tokens; how long they would be is not known"
        ]
    if found.truncated.value == 0 and 0 < 2 * found.longest_ended < limit:
        shorter = -(-3 * found.longest_ended // 2)
        return [
            f"sampling.max_completion_length {shorter}: the longest completion has {found.longest_ended} tokens, so "
            f"{limit} only reserves memory; leave it where completions are expected to grow"
        ]
    return []


def _memory(found: Forecast, config: Config, *, on_cpu: bool) -> list[str]:
    tokens, total = config.tokens_per_batch, found.peak_gib + found.free_gib
    share = found.peak_gib / total
    if share > MUCH_MEMORY:
        return [
            f"tokens_per_batch {tokens // 2}: the peak is {found.peak_gib:.1f} GiB of {total:.1f}, and longer "
            "completions need more"
        ]
    if not on_cpu and share < LITTLE_MEMORY and found.batches_per_step >= MANY_BATCHES:
        return [
            f"tokens_per_batch {2 * tokens}: a step has {found.batches_per_step:.0f} batches, and the peak is only "
            f"{found.peak_gib:.1f} GiB of {total:.1f}"
        ]
    return []
