"""Random numbers for sampling, counted instead of stateful.

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


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (>> copies the sign)."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
