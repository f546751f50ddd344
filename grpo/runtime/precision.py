"""Precision: the dtypes that layers compute in, and the differences between logprobs that their rounding explains.

A new precision is one entry of `PRECISIONS`. Logprobs are in nats and always float32, as is the output head.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator


@dataclass(frozen=True)
class Precision:
    """A dtype and its tolerances."""

    dtype: torch.dtype
    logprob: float
    """Two implementations of one model (sampler and trainer, packed and padded attention): largest mean difference."""
    copy: float
    """Two copies of one model (policy and reference before the first step): largest difference of a token."""
    hidden: float
    """Two implementations of one model: relative difference of their hidden states (norms), median over tokens."""
    sync_factor: float
    """Verification of weight sync, with all weights scaled: multiple of `logprob` that is allowed."""
    sync_scale: float = 2.0
    """Verification of weight sync: power of two that all weights are multiplied with."""


PRECISIONS = {
    precision.dtype: precision
    for precision in (
        Precision(torch.float32, logprob=1e-3, copy=1e-4, hidden=1e-3, sync_factor=10),
        # Doubled weights overflow in float16.
        Precision(torch.float16, logprob=2e-2, copy=5e-2, hidden=4e-2, sync_factor=5, sync_scale=0.5),
        Precision(torch.bfloat16, logprob=1e-1, copy=5e-2, hidden=4e-2, sync_factor=5),
    )
}

MIXED_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Accelerate's names of mixed precision, and the dtype that autocast computes linear layers in."""


def compute_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """Return the dtype of mixed precision, or None where it is off."""
    return MIXED_PRECISION.get(accelerator.mixed_precision)


def precision_of(accelerator: Accelerator, weights: torch.dtype = torch.float32) -> Precision:
    """Return the precision that layers compute in: that of autocast, or that of the `weights` where autocast is off."""
    return PRECISIONS[compute_dtype(accelerator) or weights]
