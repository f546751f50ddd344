"""Adaptive KL coefficient by hand. The estimators are in test_losses.py."""

import pytest

from grpo.kl import adapted_beta


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (0.11, 1 + 0.1 * 64 / 640),  # a tenth above the target
        (0.2, 1 + 0.2 * 64 / 640),  # twice the target: the error is bounded by 0.2
        (5.0, 1 + 0.2 * 64 / 640),
        (0.09, 1 - 0.1 * 64 / 640),
        (0.0, 1 - 0.2 * 64 / 640),
        (0.1, 1.0),
    ],
)
def test_adapted_beta_by_hand(kl: float, factor: float) -> None:
    assert adapted_beta(0.5, kl, target=0.1, completions=64, horizon=640) == pytest.approx(0.5 * factor, rel=1e-12)
