import math

import pytest
import torch

from grpo.objective import OBJECTIVES, Counts, clipped_loss, kl_estimate
from grpo.packing import pack
from tests.fakes import group


def batch_of(advantages: list[float], lengths: list[int]):
    made = group(0, [5], [[6] * length for length in lengths])
    return pack([made], torch.tensor([advantages]), max_tokens=99)[0]


def test_clip_by_hand() -> None:
    # ratios 1.5 and 0.5, epsilon 0.2
    # A = +1: -min(1.5, 1.2) = -1.2 and -min(0.5, 0.8) = -0.5;  A = -1: -min(-1.5, -1.2) = 1.5 and -min(-0.5, -0.8) = 0.8
    batch = batch_of([1.0, -1.0], [2, 2])
    logprobs = torch.log(torch.tensor([1.5, 0.5, 1.5, 0.5])).requires_grad_()
    sums = clipped_loss(logprobs, torch.zeros(4), None, batch, OBJECTIVES.get("dapo"), beta=0.0, epsilon=0.2)
    assert math.isclose(sums.loss.item(), -1.2 - 0.5 + 1.5 + 0.8, rel_tol=1e-6)
    assert sums.clipped.item() == 2  # the first and the last
    sums.loss.backward()
    # d(-ratio * A) / d logp = -ratio * A where not clipped, 0 where clipped
    assert torch.allclose(logprobs.grad, torch.tensor([0.0, -0.5, 1.5, 0.0]))


def test_epsilon_high_opens_the_upper_clip_only() -> None:
    batch = batch_of([1.0], [1])
    one = clipped_loss(
        torch.log(torch.tensor([1.5])), torch.zeros(1), None, batch, OBJECTIVES.get("dapo"),
        beta=0.0, epsilon=0.2, epsilon_high=0.28,
    )  # fmt: skip
    assert math.isclose(one.loss.item(), -1.28, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # lengths 1 and 3, A = +1 and -1, ratio 1: token losses -1 | 1 1 1
        ("dapo", (-1 + 3) / 4),
        ("bnpo", (-1 + 3) / 4),
        ("grpo", (-1 + 1) / 2),
        ("dr_grpo", (-1 + 3) / (2 * 10)),
    ],
)
def test_variants_by_hand(name: str, expected: float) -> None:
    objective = OBJECTIVES.get(name)
    sums = clipped_loss(
        torch.zeros(4), torch.zeros(4), None, batch_of([1.0, -1.0], [1, 3]), objective, beta=0, epsilon=0.2
    )
    assert math.isclose(sums.loss.item() / objective.denominator(Counts(4, 2, 10)), expected, abs_tol=1e-7)


def test_kl_estimators_by_hand() -> None:
    policy, reference = torch.tensor([-1.0]), torch.tensor([-1.5])  # d = -0.5
    assert kl_estimate(policy, reference, "k1").item() == 0.5
    assert kl_estimate(policy, reference, "k2").item() == 0.125
    assert math.isclose(kl_estimate(policy, reference, "k3").item(), math.exp(-0.5) + 0.5 - 1, rel_tol=1e-6)
    assert kl_estimate(policy, policy, "k3").item() == 0


def test_finite_at_any_log_ratio() -> None:
    batch = batch_of([1.0, -1.0], [2, 2])
    logprobs = torch.tensor([100.0, -100.0, 100.0, -100.0]).requires_grad_()
    sums = clipped_loss(logprobs, torch.zeros(4), torch.zeros(4), batch, OBJECTIVES.get("grpo"), beta=0.04, epsilon=0.2)
    sums.loss.backward()
    assert torch.isfinite(sums.loss)
    assert torch.isfinite(logprobs.grad).all()
