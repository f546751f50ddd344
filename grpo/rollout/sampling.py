"""Counter-based random numbers for sampling: they have no state.

Each sampled token depends only on (seed, draw of its prompt, sample index, position). A resumed run therefore needs no
sampler state, and a completion does not depend on the rows that are decoded beside it or on the number of processes.
"""

import torch
from torch import Tensor

from grpo.kernels.sampling import draw_tokens, restrict
from grpo.types import SamplingPlan


def draw(logits_BV: Tensor, uniform_B: Tensor, plan: SamplingPlan, seen_BV: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the next tokens [B] and their logprobs [B] under the distribution that they are drawn from.

    Args:
        seen_BV: [B, V] bool, tokens of the prompt and the completion so far, to which the new ones are added. None
            without a repetition_penalty.
    """
    if not plan.is_restricted:
        return draw_tokens(logits_BV, uniform_B, plan.temperature)
    limits = {"top_k": plan.top_k, "top_p": plan.top_p, "min_p": plan.min_p}
    penalty = plan.repetition_penalty
    logits = restrict(logits_BV, plan.temperature, **limits, repetition_penalty=penalty, seen_BV=seen_BV)  # type: ignore[arg-type]
    tokens, logprobs = draw_tokens(logits, uniform_B, 1.0 if plan.temperature else 0.0)
    if seen_BV is not None:
        seen_BV.scatter_(1, tokens[:, None], True)
    return tokens, logprobs


_MASK = (1 << 64) - 1


def stream_key(seed: int, draw: int, sample: int) -> int:
    """Return a 63-bit key for one completion, which selects its stream of random numbers.

    Args:
        seed: seed of the run's sampling.
        draw: number of the draw of the prompt.
        sample: index of the completion in its group.
    """
    key = 0
    for part in (seed, draw, sample):  # mixed in turn, so that the order of the parts matters
        key = _mix_int((key ^ (part & _MASK)) + 0x9E3779B97F4A7C15)
    return key >> 1


def counted_uniform(keys_B: Tensor, positions_B: Tensor) -> Tensor:
    """Return uniform numbers in [0, 1) by splitmix64 (Steele et al., OOPSLA 2014).

    Args:
        keys_B: [B] int64, or any shape that broadcasts with positions_B.
        positions_B: [B] int64, index of the token in the stream.

    Returns:
        [B] float64.
    """
    state = keys_B * 2 + (positions_B + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15 as int64; products wrap
    state = (state ^ _shift(state, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    state = (state ^ _shift(state, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    state = state ^ _shift(state, 31)
    return _shift(state, 11).to(torch.float64) * 2.0**-53


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64. The operator >> extends the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(value: int) -> int:
    """Finaliser of splitmix64 on 64-bit integers."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
