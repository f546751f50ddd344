"""Sampling: logits [B, V] -> tokens [B] and their logprobs [B], with seeds that are counted, not stateful.

Each drawn token depends on (seed, draw of its prompt, sample index, position) only. So a resumed run needs no sampler
state, and a completion does not depend on which other rows were decoded beside it, nor on how many processes there are.
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def stream_key(seed: int, draw: int, sample: int) -> int:
    """One 63-bit key per completion, so that its tokens have a random stream of their own."""
    key = 0
    for part in (seed, draw, sample):  # mixed one after the other: seed 1 draw 0 is not seed 0 draw 1
        key = _mix_int((key ^ (part & _MASK)) + 0x9E3779B97F4A7C15)
    return key >> 1


def counted_uniform(keys_B: Tensor, positions_B: Tensor) -> Tensor:
    """[B] keys and [B] positions (int64) -> [B] float64 uniform on [0, 1): splitmix64 (Steele et al., OOPSLA 2014)."""
    state = keys_B * 2 + (positions_B + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15 as int64; products wrap
    state = (state ^ _shift(state, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    state = (state ^ _shift(state, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    state = state ^ _shift(state, 31)
    return _shift(state, 11).to(torch.float64) * 2.0**-53


def draw_tokens(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row from softmax(logits / temperature), by inverting the cumulative distribution at `uniform`.

    temperature 0 takes the most likely token. -> tokens [B] int64, logprobs [B] float32 under the distribution drawn
    from (for temperature 0: the unscaled softmax).
    """
    logits = logits_BV.float()
    if temperature > 0:
        logits = logits / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        # The first index whose cumulative sum exceeds u * total: a token of probability 0 is never it.
        cumulative = logprobs.exp().cumsum(-1)
        threshold = uniform_B.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (>> copies the sign)."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
