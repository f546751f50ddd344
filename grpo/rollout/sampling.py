"""Sampling: logits [B, V] -> tokens [B] and their logprobs [B], with seeds that are counted, not stateful.

Each drawn token depends on (seed, draw of its prompt, sample index, position) only. So a resumed run needs no sampler
state, and a completion does not depend on which other rows were decoded beside it, nor on how many processes there are.
"""

import functools

import torch
from torch import Tensor

from grpo.kernels.cpu.compiler import kernels, plain, pointer, threads_for

_MASK = (1 << 64) - 1
BLOCK = 128
"""Tokens per block of the two-level draw."""


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

    The inversion has two levels: first the block of BLOCK tokens, then the token in it. So no cumulative sum runs over
    the whole vocabulary, which is slow, and in float32 also wrong in its last digits; the short ones are float64.
    """
    library = kernels() if plain(logits_BV) and plain(uniform_B, dtype=torch.float64) else None
    if library is not None:
        rows, size = logits_BV.shape
        blocks = uniform_B.new_empty(rows, -(-size // BLOCK))
        tokens, logprobs = torch.empty(rows, dtype=torch.long), logits_BV.new_empty(rows)
        tensors = (logits_BV, uniform_B, blocks, tokens, logprobs)
        library.draw(threads_for(logits_BV.numel()), rows, size, temperature, *map(pointer, tensors))
        return tokens, logprobs
    logits = logits_BV.float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    weights = logits.softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        whole = weights.shape[-1] // BLOCK * BLOCK
        blocks = weights[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
        if whole < weights.shape[-1]:
            blocks = torch.cat([blocks, weights[:, whole:].sum(-1, keepdim=True)], -1)
        blocks = blocks.double()
        block, rest = _invert(blocks, uniform_B.double() * blocks.sum(-1))
        index = block[:, None] * BLOCK + _block_places(logits.device)
        inside = weights.gather(-1, index.clamp(max=logits.shape[-1] - 1)).double()
        tokens = block * BLOCK + _invert(inside.masked_fill_(index >= logits.shape[-1], 0.0), rest)[0]
    return tokens, weights.gather(-1, tokens[:, None]).squeeze(-1).log()


@functools.cache
def _block_places(device: torch.device) -> Tensor:
    return torch.arange(BLOCK, device=device)


def _invert(weights: Tensor, threshold_B: Tensor) -> tuple[Tensor, Tensor]:
    """[B, K] float64 weights -> the first index whose cumulative sum exceeds the threshold [B], and what of the threshold
    is left inside it. An index of weight 0 is never it: a threshold at or beyond the total (rounding) is pulled below it."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    threshold = torch.minimum(threshold_B, torch.nextafter(total, torch.zeros_like(total)))[:, None]
    index = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=weights.shape[-1] - 1)
    before = cumulative.gather(-1, index) - weights.gather(-1, index)
    return index.squeeze(-1), (threshold - before).squeeze(-1).clamp_(min=0)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (>> copies the sign)."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
