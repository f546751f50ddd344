"""Precision: one entry per dtype, chosen by mixed precision first and the weights second."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo.runtime.precision import PRECISIONS, compute_dtype, precision_of


@pytest.mark.parametrize(
    ("mixed", "weights", "expected", "tolerance"),
    [
        ("no", torch.float32, torch.float32, 1e-3),
        ("no", torch.bfloat16, torch.bfloat16, 1e-1),
        ("bf16", torch.float32, torch.bfloat16, 1e-1),
        ("fp16", torch.float32, torch.float16, 2e-2),
    ],
)
def test_autocast_decides_then_the_weights(
    mixed: str, weights: torch.dtype, expected: torch.dtype, tolerance: float
) -> None:
    accelerator: Any = SimpleNamespace(mixed_precision=mixed)
    precision = precision_of(accelerator, weights)
    assert (precision.dtype, precision.logprob) == (expected, tolerance)
    assert compute_dtype(accelerator) == (None if mixed == "no" else expected)


def test_scaled_weights_can_be_scaled_back_exactly() -> None:
    for dtype, precision in PRECISIONS.items():
        weights = torch.tensor([1e-3, 0.3, 7.0], dtype=dtype)
        assert torch.equal(weights * precision.sync_scale * (1 / precision.sync_scale), weights)
