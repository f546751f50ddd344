"""Every variant by hand, its gradients by enumeration, and common properties."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.config.schema import Config, ObjectiveConfig
from grpo.errors import ConfigError
from grpo.kl import kl_estimate
from grpo.losses import (
    LOSSES,
    Counts,
    LossFunction,
    LossOutput,
    check_loss,
    find_loss,
    policy_loss,
    register_loss,
)
from grpo.objectives.correction import (
    importance_correction,
    off_policy_mask,
    policy_term_mask,
    quantile,
    sequence_log_correction,
)
from grpo.objectives.entropy import EntropyBonus
from grpo.packing import PackedBatch, pack
from tests.fakes import group

VARIANTS = LOSSES.names()


def batch_of(advantages: list[float], lengths: list[int]) -> PackedBatch:
    made = group(0, [5], [[6] * length for length in lengths])
    return pack([made], torch.tensor([advantages]), max_tokens=9999)[0]


def loss_of(
    name: str | LossFunction,
    batch: PackedBatch,
    logprobs: Tensor,
    old: Tensor | None = None,
    reference: Tensor | None = None,
    *,
    counts: Counts | None = None,
    **changes: object,
) -> LossOutput:
    """Return the loss of one batch, which is the whole mini-batch unless `counts` is given."""
    old = logprobs.detach() if old is None else old
    chosen = vars(replace(ObjectiveConfig(), **changes))
    counts = counts or Counts(float(len(batch.tokens_N)), float(len(batch.lengths_S)), 10)
    function = LOSSES.get(name) if isinstance(name, str) else name
    return policy_loss(logprobs, old, reference, batch, function, counts, chosen)


def forget(name: str) -> None:
    del LOSSES._entries[name], LOSSES._sources[name]


def test_clip_by_hand() -> None:
    # ratios 1.5 and 0.5, epsilon 0.2
    # A = +1: -min(1.5, 1.2) = -1.2 and -min(0.5, 0.8) = -0.5;  A = -1: -min(-1.5, -1.2) = 1.5 and -min(-0.5, -0.8) =
    # 0.8
    batch = batch_of([1.0, -1.0], [2, 2])
    logprobs = torch.log(torch.tensor([1.5, 0.5, 1.5, 0.5])).requires_grad_()
    got = loss_of("dapo", batch, logprobs, torch.zeros(4))
    assert math.isclose(got.loss.item(), (-1.2 - 0.5 + 1.5 + 0.8) / 4, rel_tol=1e-6)
    assert got.clipped.item() == 2  # the first and the last
    got.loss.backward()
    # d(-ratio * A) / d logp = -ratio * A where not clipped, 0 where clipped
    assert torch.allclose(logprobs.grad, torch.tensor([0.0, -0.5, 1.5, 0.0]) / 4)


def test_epsilon_high_opens_the_upper_clip_only() -> None:
    one = loss_of("dapo", batch_of([1.0], [1]), torch.log(torch.tensor([1.5])), torch.zeros(1), epsilon_high=0.28)
    assert math.isclose(one.loss.item(), -1.28, rel_tol=1e-6)


def test_delta_bounds_what_the_clip_leaves_open() -> None:
    # A = -1, ratio 9: -min(-9, -1.2) = 9 and a gradient of 9; with delta 4: 4 and none. A = +1 is clipped at 1.2
    # already.
    batch = batch_of([-1.0, 1.0], [1, 1])
    logprobs = torch.log(torch.tensor([9.0, 9.0])).requires_grad_()
    assert math.isclose(loss_of("dapo", batch, logprobs, torch.zeros(2)).loss.item(), (9 - 1.2) / 2, rel_tol=1e-6)
    bounded = loss_of("dapo", batch, logprobs, torch.zeros(2), delta=4.0)
    assert math.isclose(bounded.loss.item(), (4 - 1.2) / 2, rel_tol=1e-6)
    bounded.loss.backward()
    assert logprobs.grad.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # lengths 1 and 3, A = +1 and -1, ratio 1: token losses -1 | 1 1 1
        ("dapo", (-1 + 3) / 4),
        ("bnpo", (-1 + 3) / 4),
        ("gfpo", (-1 + 3) / 4),
        ("grpo", (-1 + 1) / 2),
        ("gspo", (-1 + 1) / 2),
        ("gmpo", (-1 + 1) / 2),
        ("luspo", (-1 + 3) / 2),
        ("dr_grpo", (-1 + 3) / (2 * 10)),
        # sigmoid(0) * 4 / tau = 2 / tau: -2 / 1 and 2 / 1.05
        ("sapo", (-2 + 2 / 1.05) / 2),
        # weight 1 at ratio 1; logp is -2 everywhere: -A * logp = 2 | -2 -2 -2
        ("cispo", (2 - 6) / 4),
        ("vespo", (2 - 6) / 4),
        ("reinforce_plus_plus", (2 - 6) / 4),
        ("rloo", (2 - 6) / 2),
    ],
)
def test_variants_by_hand(name: str, expected: float) -> None:
    got = loss_of(name, batch_of([1.0, -1.0], [1, 3]), torch.full((4,), -2.0))
    assert math.isclose(got.loss.item(), expected, rel_tol=1e-5, abs_tol=1e-7)


def test_every_variant_has_a_value_by_hand() -> None:
    [mark] = test_variants_by_hand.pytestmark
    assert {name for name, _ in mark.args[1]} == set(VARIANTS)


# On-policy every variant is REINFORCE: d loss / d logp = -A * weight / denominator. (sapo: sigmoid'(0) * 4 / tau *
# tau = 1.)
@pytest.mark.parametrize("name", VARIANTS)
def test_on_policy_every_gradient_is_the_policy_gradient(name: str) -> None:
    lengths = torch.tensor([1.0, 3.0, 3.0, 3.0])
    weights = {
        "token": torch.ones(4) / 4,
        "sequence": 1 / lengths / 2,
        "sequence_sum": torch.ones(4) / 2,
        "max_length": torch.ones(4) / 20,
    }[LOSSES.get(name).per]
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -3.0], requires_grad=True)
    loss_of(name, batch_of([0.7, -1.3], [1, 3]), logprobs).loss.backward()
    advantages = torch.tensor([0.7, -1.3, -1.3, -1.3])
    assert torch.allclose(logprobs.grad, -advantages * weights, rtol=1e-5)


def test_gspo_by_hand() -> None:
    # completion 1: log-ratios 0.3 and -0.1, mean 0.1, ratio e^0.1; A = 1, not clipped at 1.2: loss -e^0.1
    # completion 2: log-ratio -0.5, ratio e^-0.5 < 0.8; A = -1: -min(-e^-0.5, -0.8) = 0.8, clipped
    batch = batch_of([1.0, -1.0], [2, 1])
    logprobs = torch.tensor([0.3, -0.1, -0.5], requires_grad=True)
    got = loss_of("gspo", batch, logprobs, torch.zeros(3))
    assert math.isclose(got.loss.item(), (-math.exp(0.1) + 0.8) / 2, rel_tol=1e-6)
    assert got.clipped.item() == 1
    got.loss.backward()
    assert torch.allclose(logprobs.grad, torch.tensor([-math.exp(0.1) / 4, -math.exp(0.1) / 4, 0.0]))


def test_sequence_and_token_ratios_are_one_where_completions_are_one_token_long() -> None:
    batch = batch_of([1.0, -1.0], [1, 1])
    logprobs, old = torch.tensor([-0.5, -1.5]), torch.tensor([-0.9, -1.2])
    assert loss_of("gspo", batch, logprobs, old).loss.item() == loss_of("grpo", batch, logprobs, old).loss.item()


def test_importance_sampling_level_wins_over_the_variants_own() -> None:
    batch = batch_of([1.0, -1.0], [2, 2])
    logprobs, old = torch.tensor([-0.5, -1.5, -0.1, -2.0]), torch.tensor([-0.6, -1.4, -0.3, -1.8])
    by_key = loss_of("grpo", batch, logprobs, old, importance_sampling_level="sequence").loss
    assert by_key == loss_of("gspo", batch, logprobs, old).loss
    assert by_key != loss_of("grpo", batch, logprobs, old).loss


def test_cispo_caps_the_weight_and_keeps_the_gradient() -> None:
    # ratio 9, cap 5: gradient -A * 5 / 1, where the clipped objective has none
    logprobs = torch.tensor([math.log(9.0)], requires_grad=True)
    got = loss_of("cispo", batch_of([1.0], [1]), logprobs, torch.zeros(1), epsilon_high=5.0)
    got.loss.backward()
    assert math.isclose(logprobs.grad.item(), -5, rel_tol=1e-6)
    assert got.clipped.item() == 1


def test_vespo_weight_by_hand() -> None:
    # two tokens, log-ratios 0.2 and 0.3: w = e^0.5; A > 0: log phi = 3 + 2 * 0.5 - 3 * e^0.5
    phi = math.exp(3 + 2 * 0.5 - 3 * math.exp(0.5))
    logprobs = torch.tensor([0.2, 0.3], requires_grad=True)
    loss_of("vespo", batch_of([2.0], [2]), logprobs, torch.zeros(2)).loss.backward()
    assert torch.allclose(logprobs.grad, torch.full((2,), -phi * 2.0 / 2))
    # A < 0: k is 3 and lambda is 2
    phi = math.exp(2 + 3 * 0.5 - 2 * math.exp(0.5))
    logprobs = torch.tensor([0.2, 0.3], requires_grad=True)
    loss_of("vespo", batch_of([-2.0], [2]), logprobs, torch.zeros(2)).loss.backward()
    assert torch.allclose(logprobs.grad, torch.full((2,), phi * 2.0 / 2))


def test_the_entropy_bonus_by_hand() -> None:
    """Mean over the 3 tokens that count, times 0.5, taken off the loss: more entropy, less loss."""
    batch = replace(batch_of([1.0, -1.0], [1, 3]), weights_N=torch.tensor([0.0, 1.0, 1.0, 1.0]))
    logprobs, entropies = torch.zeros(4), torch.tensor([9.0, 1.0, 2.0, 3.0], requires_grad=True)

    def loss(coefficient: float) -> Tensor:
        settings, counts = vars(replace(ObjectiveConfig(), entropy_coef=coefficient)), Counts(3.0, 1.0, 10)
        function = LOSSES.get("grpo")
        return policy_loss(logprobs, logprobs, None, batch, function, counts, settings, entropies_N=entropies).loss

    assert math.isclose((loss(0.5) - loss(0.0)).item(), -0.5 * (1 + 2 + 3) / 3, rel_tol=1e-6)
    loss(0.5).backward()
    assert torch.allclose(entropies.grad, torch.tensor([0.0, -0.5 / 3, -0.5 / 3, -0.5 / 3]))


def test_the_kl_term_by_hand() -> None:
    """d = log 2 for both tokens, ratio 3 and 1: k3 = 2 - log 2 - 1, with the ratio as a factor or without."""
    batch = batch_of([0.0, 0.0], [1, 1])
    logprobs, old = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0 - math.log(3), -1.0])
    reference, k3 = logprobs + math.log(2), 2 - math.log(2) - 1
    for corrected, ratios in [(True, 3 + 1), (False, 1 + 1)]:
        got = loss_of("dapo", batch, logprobs, old, reference, beta=0.5, use_bias_correction_kl=corrected)
        assert math.isclose(got.loss.item(), 0.5 * k3 * ratios / 2, rel_tol=1e-5)
        assert math.isclose(got.kl.item(), 2 * k3, rel_tol=1e-5)
    masked = replace(batch, weights_N=torch.tensor([1.0, 0.0]))
    assert math.isclose(loss_of("dapo", masked, logprobs, old, reference).kl.item(), k3, rel_tol=1e-5)


def test_the_correction_is_no_weight_of_the_kl() -> None:
    batch, logprobs = batch_of([0.0], [1]), torch.tensor([-1.0])
    settings, counts = vars(ObjectiveConfig()), Counts(1.0, 1.0, 10)
    got = [
        policy_loss(
            logprobs, logprobs, logprobs + 1, batch, LOSSES.get("dapo"), counts, settings, correction_N=correction
        ).loss.item()
        for correction in (None, torch.tensor([0.25]))
    ]
    assert got[0] == got[1] > 0


def test_estimators_by_hand() -> None:
    logprobs, reference = torch.tensor([-2.0]), torch.tensor([-2.5])  # d = -0.5
    for name, value in [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) + 0.5 - 1)]:
        assert math.isclose(kl_estimate(logprobs, reference, name).item(), value, rel_tol=1e-6), name


def test_clipped_tokens_by_hand() -> None:
    """Ratio 0.5: clipped where A < 0; ratio 1.5: where A > 0. With the other sign the token keeps its gradient."""
    for advantage, expected in [(-1.0, 1), (1.0, 1)]:
        logprobs = torch.log(torch.tensor([0.5, 1.5]))
        assert loss_of("dapo", batch_of([advantage], [2]), logprobs, torch.zeros(2)).clipped.item() == expected
        one = torch.log(torch.tensor([0.5 if advantage > 0 else 1.5]))
        assert loss_of("dapo", batch_of([advantage], [1]), one, torch.zeros(1)).clipped.item() == 0


def test_no_denominator_is_below_1() -> None:
    """All completions are masked, or the step has none: nothing is divided by 0."""
    for per in ("token", "sequence", "sequence_sum", "max_length"):
        assert Counts(0.0, 0.0, 10).denominator(per) == 1.0


def test_vespo_corrects_the_ratio_of_the_completion_and_not_its_tokens() -> None:
    """The correction is a factor of w, inside the weight (arXiv 2602.10693; TRL's get_gamma_weights), for each mode."""
    sampling = torch.tensor([-0.3, -1.7, -0.2])
    batch, logprobs, old = batch_of([2.0], [3]), torch.tensor([0.2, 0.3, -0.1]), torch.zeros(3)
    # w(old / sampling) = e^0.3, e^1.7, e^0.2; capped at 2: 0.3 + log 2 + 0.2. Masked: the second is 0, counted as 1e-8.
    # Of the whole completion: w = e^2.2, capped at 2, once for all three tokens.
    for mode, log_correction in [
        ("truncate", 0.5 + math.log(2)),
        ("mask", 0.5 + math.log(1e-8)),
        ("sequence_truncate", math.log(2)),
    ]:
        given = logprobs.clone().requires_grad_()
        weights = importance_correction(old, sampling, mode, 2.0, batch=batch)
        both = {"correction_N": weights, "sequence_log_correction_N": sequence_log_correction(weights, batch, mode)}
        settings = vars(ObjectiveConfig())
        policy_loss(
            given, old, None, batch, LOSSES.get("vespo"), Counts(3.0, 1.0, 10), settings, **both
        ).loss.backward()
        log_w = max(0.4 + log_correction, math.log(1e-8))
        phi = math.exp(3 + 2 * log_w - 3 * math.exp(log_w))
        assert torch.allclose(given.grad, torch.full((3,), -phi * 2.0 / 3), rtol=1e-4, atol=0), mode


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"vespo"}))
def test_the_correction_weighs_each_token_of_the_other_losses(name: str) -> None:
    batch, logprobs = batch_of([1.0, -1.0], [1, 1]), torch.tensor([-0.5, -1.5])

    def gradient(correction: Tensor | None) -> Tensor:
        given = logprobs.clone().requires_grad_()
        function, settings = LOSSES.get(name), vars(ObjectiveConfig())
        policy_loss(
            given, logprobs, None, batch, function, Counts(2.0, 2.0, 10), settings, correction_N=correction
        ).loss.backward()
        return given.grad

    weights = torch.tensor([0.25, 2.0])
    assert torch.allclose(gradient(weights), gradient(None) * weights)


def test_the_kl_pulls_back_however_far_below_the_reference_lies() -> None:
    """d = -30: k3 = e^-30 + 30 - 1, and its gradient is 1 - e^-30 = 1. A lower bound on d would make it 0."""
    logprobs = torch.zeros(1, requires_grad=True)
    value = kl_estimate(logprobs, torch.tensor([-30.0]), "k3")
    value.sum().backward()
    assert value.item() == 29 and logprobs.grad.item() == 1
    for estimator, gradient in [("k1", 1.0), ("k2", 30.0)]:
        logprobs = torch.zeros(1, requires_grad=True)
        kl_estimate(logprobs, torch.tensor([-30.0]), estimator).sum().backward()
        assert logprobs.grad.item() == gradient, estimator
    # Above, the estimate is held: at d = 25 and at d = 20 it is the same, and finite at any d.
    at = [kl_estimate(torch.zeros(1), torch.tensor([d]), "k3").item() for d in (20.0, 25.0, 1e4)]
    assert at[0] == at[1] == at[2] and math.isclose(at[0], math.exp(20) - 21, rel_tol=1e-6)


def test_the_ratio_is_capped_at_e_to_the_20_and_has_no_floor() -> None:
    # A = -1 and no delta: the unclipped ratio counts; beyond e^20 it is e^20, without a gradient.
    for log_ratio, ratio, slope in [(19.0, math.exp(19), math.exp(19)), (21.0, math.exp(20), 0.0)]:
        logprobs = torch.tensor([log_ratio], requires_grad=True)
        got = loss_of("dapo", batch_of([-1.0], [1]), logprobs, torch.zeros(1))
        got.loss.backward()
        assert math.isclose(got.loss.item(), ratio, rel_tol=1e-5)
        assert math.isclose(logprobs.grad.item(), slope, rel_tol=1e-5)
    # Two tokens of a completion at -30 and 19: their mean is -5.5, and both have the gradient of GSPO.
    logprobs = torch.tensor([-30.0, 19.0], requires_grad=True)
    loss_of("gspo", batch_of([1.0], [2]), logprobs, torch.zeros(2)).loss.backward()
    assert torch.allclose(logprobs.grad, torch.full((2,), -math.exp(-5.5) / 2))


def test_sapo_is_soft_where_ppo_is_hard() -> None:
    # ratio 1.5, A = 1, tau = 1: d/dlogp of 4 * sigmoid(0.5) = 4 * s * (1 - s) * 1.5
    s = 1 / (1 + math.exp(-0.5))
    logprobs = torch.log(torch.tensor([1.5])).requires_grad_()
    loss_of("sapo", batch_of([1.0], [1]), logprobs, torch.zeros(1)).loss.backward()
    assert math.isclose(logprobs.grad.item(), -4 * s * (1 - s) * 1.5, rel_tol=1e-6)
    # A = -1, tau = 2: 4 * sigmoid(2 * 0.5) / 2, derivative 4 * s * (1 - s) * 1.5
    s = 1 / (1 + math.exp(-1.0))
    logprobs = torch.log(torch.tensor([1.5])).requires_grad_()
    got = loss_of("sapo", batch_of([-1.0], [1]), logprobs, torch.zeros(1), sapo_temperature_neg=2.0)
    got.loss.backward()
    assert math.isclose(got.loss.item(), 4 * s / 2, rel_tol=1e-6)
    assert math.isclose(logprobs.grad.item(), 4 * s * (1 - s) * 1.5, rel_tol=1e-6)


def test_correction_by_hand() -> None:
    old, sampling = torch.log(torch.tensor([1.0, 3.0, 0.1])), torch.zeros(3)
    assert importance_correction(old, sampling, "none") is None
    assert torch.allclose(importance_correction(old, sampling, "truncate", 2.0), torch.tensor([1.0, 2.0, 0.1]))
    assert importance_correction(old, sampling, "mask", 2.0).tolist() == [1.0, 0.0, 0.0]
    assert importance_correction(old, old, "truncate").tolist() == [1.0] * 3  # exactly
    near = torch.log(torch.tensor([1.9, 0.6, 2.1, 0.4]))
    kept = importance_correction(near, torch.zeros(4), "mask", 2.0)
    assert torch.allclose(kept, torch.tensor([1.9, 0.6, 0.0, 0.0]))
    wide = importance_correction(near, torch.zeros(4), "mask", 2.0, 0.0)
    assert torch.allclose(wide, torch.tensor([1.9, 0.6, 0.0, 0.4]))
    assert importance_correction(near, torch.zeros(4), "truncate", 1.5, 0.5).tolist() == pytest.approx(
        [1.5, 0.6, 1.5, 0.5]
    )


def test_the_correction_of_whole_completions_by_hand() -> None:
    """Two completions: ratios 2 and 1.5 (product 3, mean sqrt 3); 0.5, 0.8 and 1 (product 0.4, mean 0.737)."""
    batch = batch_of([1.0, -1.0], [2, 3])
    old, sampling = torch.log(torch.tensor([2.0, 1.5, 0.5, 0.8, 1.0])), torch.zeros(5)

    def weights(mode: str, *bounds: float) -> list[float]:
        found = importance_correction(old, sampling, mode, *bounds, batch=batch)
        assert found is not None
        return found.tolist()

    assert weights("sequence_truncate", 2.0) == pytest.approx([2.0] * 2 + [0.4] * 3)
    assert weights("sequence_truncate", 4.0, 0.5) == pytest.approx([3.0] * 2 + [0.5] * 3)
    assert weights("sequence_mask", 2.0) == pytest.approx([0.0] * 5)
    assert weights("sequence_mask", 3.01, 0.39) == pytest.approx([3.0] * 2 + [0.4] * 3)
    assert weights("geometric_mask", 2.0) == pytest.approx([3**0.5] * 2 + [0.4 ** (1 / 3)] * 3)
    assert weights("geometric_mask", 1.7) == pytest.approx([0.0] * 2 + [0.4 ** (1 / 3)] * 3)
    assert importance_correction(old, old, "sequence_mask", batch=batch).tolist() == [1.0] * 5  # exactly


def test_completions_far_from_the_policy_are_not_pushed_away_further() -> None:
    """The means of sampling - logprobs are 0.5, 0.5 and 0.1. Above 0.3, only the first is left out: its A < 0."""
    batch = replace(batch_of([-1.0, 1.0, -1.0], [2, 1, 1]), sampling_logprobs_N=torch.tensor([-1.0, -2.0, -1.0, -1.0]))
    logprobs = torch.tensor([-1.2, -2.8, -1.5, -1.1])
    assert off_policy_mask(logprobs, batch, 0.3).tolist() == [0, 0, 1, 1]
    assert off_policy_mask(logprobs, batch, 0.6).tolist() == [1, 1, 1, 1]
    settings = ObjectiveConfig(off_policy_mask_threshold=0.3)
    assert policy_term_mask(settings, logprobs, batch, torch.tensor([True, True, True, False])).tolist() == [0, 0, 1, 0]
    assert policy_term_mask(ObjectiveConfig(), logprobs, batch, None) is None


def test_the_mask_is_of_the_policy_term_only() -> None:
    """Two tokens, d = -1 each: k1 is 1. The mask takes the first token's -A away, and no KL, and no denominator."""
    batch, logprobs = batch_of([2.0, 2.0], [1, 1]), torch.tensor([-1.0, -1.0])
    settings = vars(ObjectiveConfig(beta=0.5, kl_estimator="k1"))
    found = policy_loss(
        logprobs,
        logprobs,
        logprobs - 1,
        batch,
        LOSSES.get("dapo"),
        Counts(2.0, 2.0, 9),
        settings,
        mask_N=torch.tensor([0.0, 1.0]),
    )
    assert found.loss.item() == pytest.approx((-2.0 + 2 * 0.5) / 2)


def test_a_teacher_is_an_advantage_of_each_token() -> None:
    """On-policy distillation: no reward, beta 1, rho * k3. The gradient is that of -d * logp at each token."""
    batch, teacher = batch_of([0.0, 0.0], [2, 1]), torch.tensor([-0.5, -2.0, -1.0])
    logprobs = torch.tensor([-1.0, -1.5, -1.0], requires_grad=True)
    loss_of("dapo", batch, logprobs, None, teacher, beta=1.0).loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-0.5 / 3, 0.5 / 3, 0.0], abs=1e-7)


def test_adaptive_entropy_by_hand() -> None:
    """Target 1, steps of 0.1 from 0.25 on, at most 0.4: entropies 2, 0.5, 0.5, 0.5, 3 and none."""
    settings = {"entropy_coef": 0.25, "entropy_coef_delta": 0.1, "entropy_coef_max": 0.4, "entropy_target": 1.0}
    bonus = EntropyBonus(ObjectiveConfig(use_adaptive_entropy=True, **settings))
    assert bonus.applied == 0  # nothing is measured yet
    found = []
    for entropy, count in [(2.0, 4), (0.5, 4), (0.5, 4), (0.5, 4), (3.0, 4), (0.0, 0)]:
        bonus.update(entropy * count, count)
        found.append((round(bonus.coefficient, 6), round(bonus.applied, 6)))
    assert found == [(0.15, 0), (0.25, 0.25), (0.35, 0.35), (0.4, 0.4), (0.3, 0), (0.3, 0)]
    other = EntropyBonus(bonus.objective)
    other.load_state_dict(bonus.state_dict())
    assert (other.coefficient, other.entropy) == (bonus.coefficient, 3.0)
    constant = EntropyBonus(ObjectiveConfig(entropy_coef=0.1))
    constant.update(0.0, 4)
    assert constant.applied == 0.1 and constant.state_dict() == {}


def test_quantiles_are_torchs() -> None:
    values = torch.rand(11, generator=torch.Generator().manual_seed(0))
    for q in (0.0, 0.2, 0.37, 0.8, 1.0):
        assert quantile(values, q) == pytest.approx(torch.quantile(values.double(), q).item())


def test_gmpo_by_hand() -> None:
    """A completion of log-ratios 0.6 and 0.1, clipped at 0.4: A > 0: exp((0.4 + 0.1) / 2); A < 0: exp(0.35)."""
    for advantage, value, slopes in [(2.0, math.exp(0.25), [0.0, 0.5]), (-2.0, math.exp(0.35), [0.5, 0.5])]:
        logprobs = torch.tensor([0.6, 0.1], requires_grad=True)
        got = loss_of("gmpo", batch_of([advantage], [2]), logprobs, torch.zeros(2), epsilon=0.4)
        got.loss.backward()
        assert got.loss.item() == pytest.approx(-value * advantage, rel=1e-6)
        assert logprobs.grad.tolist() == pytest.approx([-advantage * value * slope for slope in slopes], rel=1e-6)
        assert got.clipped.item() == (1 if advantage > 0 else 0)


def test_a_new_variant_is_added_in_under_ten_lines(tmp_path: Path) -> None:
    # Truncated importance sampling without a lower clip, from a user's own file.
    source = (
        "from grpo import register_loss\n"
        "@register_loss('capped', per='token')\n"
        "def capped(ratio, advantages, *, epsilon):\n"
        "    return -ratio.clamp(max=1 + epsilon) * advantages\n"
    )
    assert len(source.splitlines()) < 10
    (tmp_path / "mine.py").write_text(source)
    found = find_loss(f"{tmp_path}/mine.py:capped")
    forget("capped")
    got = loss_of(found, batch_of([1.0], [2]), torch.log(torch.tensor([0.1, 3.0])), torch.zeros(2))
    assert math.isclose(got.loss.item(), -(0.1 + 1.2) / 2, rel_tol=1e-6)


def test_settings_of_a_loss_of_ones_own() -> None:
    @register_loss("test_scaled", per="token")
    def scaled(ratio: Tensor, advantages: Tensor, *, tau: float = 1.0) -> Tensor:
        return -ratio * advantages * tau

    try:
        settings = ObjectiveConfig(loss_type="test_scaled", loss_kwargs={"tau": 3.0})
        check_loss(Config(objective=settings))
        got = loss_of("test_scaled", batch_of([1.0], [1]), torch.zeros(1), loss_kwargs={"tau": 3.0})
        assert got.loss.item() == -3.0
        for name, message in [("tao", "did you mean 'tau'"), ("ratio", "the trainer gives")]:
            with pytest.raises(ConfigError, match=f"objective.loss_kwargs has '{name}'.*{message}"):
                check_loss(Config(objective=ObjectiveConfig(loss_type="test_scaled", loss_kwargs={name: 1})))
        with pytest.raises(ConfigError, match="its own arguments are: none"):
            check_loss(Config(objective=ObjectiveConfig(loss_kwargs={"gamma": 1})))
    finally:
        forget("test_scaled")


def test_a_variant_that_asks_for_what_nobody_has_is_refused() -> None:
    @register_loss("test_asks_for_returns", per="token")
    def wrong(ratio: Tensor, returns: Tensor) -> Tensor:
        return ratio * returns

    try:
        with pytest.raises(ConfigError, match="'returns'"):
            check_loss(Config(objective=ObjectiveConfig(loss_type="test_asks_for_returns")))
        with pytest.raises(ValueError, match="per is 'group'"):
            register_loss("other", per="group")(wrong)
    finally:
        forget("test_asks_for_returns")


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_finite_at_any_log_ratio(name: str, estimator: str, corrected: bool) -> None:
    batch = batch_of([1.0, -1.0], [2, 2])
    logprobs = torch.tensor([100.0, -100.0, 100.0, -100.0]).requires_grad_()
    got = loss_of(
        name, batch, logprobs, torch.zeros(4), torch.zeros(4), kl_estimator=estimator, use_bias_correction_kl=corrected
    )
    got.loss.backward()
    assert torch.isfinite(got.loss)
    assert torch.isfinite(logprobs.grad).all()


# --- What must hold for every variant: hypothesis looks for a counterexample -----------------------------------------

completions = st.lists(
    st.tuples(st.floats(-2, 2), st.lists(st.tuples(st.floats(-3, 0), st.floats(-0.5, 0.5)), min_size=1, max_size=4)),
    min_size=2,
    max_size=5,
)
"""Each completion: an advantage, and (old logprob, log-ratio) of each of its tokens."""


def tensors(samples: list) -> tuple[PackedBatch, Tensor, Tensor, Tensor]:
    batch = batch_of([advantage for advantage, _ in samples], [len(tokens) for _, tokens in samples])
    old = torch.tensor([old for _, tokens in samples for old, _ in tokens], dtype=torch.float64)
    logprobs = old + torch.tensor([d for _, tokens in samples for _, d in tokens], dtype=torch.float64)
    batch = replace(batch, advantages_N=batch.advantages_N.double(), weights_N=batch.weights_N.double())
    return batch, logprobs.requires_grad_(), old, old - 0.1


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(samples=completions, cut=st.integers(1, 4))
def test_micro_batches_do_not_change_the_gradient(name: str, samples: list, cut: int) -> None:
    batch, logprobs, old, reference = tensors(samples)
    counts = Counts(float(len(old)), float(len(samples)), 10)
    loss_of(name, batch, logprobs, old, reference, counts=counts).loss.backward()
    parts = []
    for part in (samples[:cut], samples[cut:]):
        if part:
            small, some, old_part, reference_part = tensors(part)
            loss_of(name, small, some, old_part, reference_part, counts=counts).loss.backward()
            parts.append(some.grad)
    assert torch.allclose(torch.cat(parts), logprobs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(samples=completions, order=st.randoms(use_true_random=False))
def test_the_order_of_completions_does_not_matter(name: str, samples: list, order: object) -> None:
    places = list(range(len(samples)))
    order.shuffle(places)
    shuffled = [samples[place] for place in places]

    def gradient_by_sample(made: list) -> list[Tensor]:
        batch, logprobs, old, reference = tensors(made)
        loss_of(name, batch, logprobs, old, reference).loss.backward()
        return list(logprobs.grad.split([len(tokens) for _, tokens in made]))

    plain, other = gradient_by_sample(samples), gradient_by_sample(shuffled)
    for position, place in enumerate(places):
        assert torch.allclose(other[position], plain[place], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_masked_completion_changes_nothing(name: str) -> None:
    batch = batch_of([1.0, -1.0, 2.0], [2, 3, 2])
    logprobs = torch.tensor([-0.5, -1.0, -0.3, -2.0, -0.1, -5.0, -6.0], requires_grad=True)
    old, reference = logprobs.detach() - 0.1, logprobs.detach() + 0.2
    masked = replace(batch, weights_N=torch.tensor([1.0, 1, 1, 1, 1, 0, 0]))
    loss_of(name, masked, logprobs, old, reference, counts=Counts(5.0, 2.0, 10)).loss.backward()
    alone = logprobs.detach()[:5].requires_grad_()
    loss_of(name, batch_of([1.0, -1.0], [2, 3]), alone, old[:5], reference[:5]).loss.backward()
    assert torch.allclose(logprobs.grad[:5], alone.grad)
    assert logprobs.grad[5:].tolist() == [0, 0]


# --- Gradients by enumeration: a policy over 4 tokens, every outcome weighted by its probability ----------------

LOGITS = torch.tensor([0.3, -0.8, 1.1, 0.0], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([-0.2, 0.5, 0.4, -1.0], dtype=torch.float64), 0)


def expected_gradient(of_token: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the expected gradient: sum over tokens v of p(v) * d of_token(log p(v)) / d logits, p(v) fixed."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    (logprobs.detach().exp() * of_token(logprobs)).sum().backward()
    return logits.grad


def true_kl_gradient(forward: bool) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    kl = (
        (REFERENCE.exp() * (REFERENCE - logprobs)).sum() if forward else (logprobs.exp() * (logprobs - REFERENCE)).sum()
    )
    kl.backward()
    return logits.grad


@pytest.mark.parametrize(
    ("estimator", "corrected", "meant"),
    [
        ("k1", False, "nothing"),
        ("k2", False, "reverse"),
        ("k3", False, "forward"),
        ("k1", True, "reverse"),
        ("k3", True, "reverse"),
    ],
)
def test_what_each_kl_estimator_really_descends(estimator: str, corrected: bool, meant: str) -> None:
    def of_token(logprobs: Tensor) -> Tensor:
        batch = batch_of([0.0], [4])
        counts = Counts(1.0, 1.0, 1)  # a sum: per token, weight 1
        losses = []
        for v in range(4):  # one token at a time, so that the outer sum can weigh it
            chosen = torch.zeros(4, dtype=torch.float64)
            chosen[v] = 1
            weighed = replace(batch, weights_N=chosen, advantages_N=torch.zeros(4, dtype=torch.float64))
            losses.append(
                loss_of(
                    "dapo", weighed, logprobs, None, REFERENCE, counts=counts,
                    beta=1.0, kl_estimator=estimator, use_bias_correction_kl=corrected,
                ).loss
            )  # fmt: skip
        return torch.stack(losses)

    target = {
        "nothing": torch.zeros(4, dtype=torch.float64),
        "reverse": true_kl_gradient(forward=False),
        "forward": true_kl_gradient(forward=True),
    }[meant]
    assert torch.allclose(expected_gradient(of_token), target, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_mean_gradient_is_that_of_the_expected_reward(name: str) -> None:
    """One-token completions with advantage r(v) of token v: the mean gradient is minus that of sum p * r."""
    rewards = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)
    logits = LOGITS.clone().requires_grad_()
    torch.softmax(logits, 0).mul(rewards).sum().backward()

    def of_token(logprobs: Tensor) -> Tensor:
        losses = []
        for v in range(4):
            batch = replace(batch_of([0.0], [1]), advantages_N=rewards[v : v + 1])
            losses.append(loss_of(name, batch, logprobs[v : v + 1], counts=Counts(1.0, 1.0, 1)).loss)
        return torch.stack(losses)

    assert torch.allclose(expected_gradient(of_token), -logits.grad, atol=1e-7)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.9, 4.1])
@pytest.mark.parametrize("delta", [None, 4.0])
def test_every_clip_branch(advantage: float, ratio: float, delta: float | None) -> None:
    """Return the gradient by finite differences of an independent formula."""

    def formula(r: float) -> float:
        return -min(min(r, delta or r) * advantage, min(max(r, 0.8), 1.2) * advantage)

    step = 1e-6
    slope = (formula(ratio * math.exp(step)) - formula(ratio * math.exp(-step))) / (2 * step)
    logprobs = torch.log(torch.tensor([ratio], dtype=torch.float64)).requires_grad_()
    batch = replace(batch_of([advantage], [1]), advantages_N=torch.tensor([advantage], dtype=torch.float64))
    got = loss_of("dapo", batch, logprobs, torch.zeros(1, dtype=torch.float64), delta=delta).loss
    got.backward()
    assert math.isclose(got.item(), formula(ratio), rel_tol=1e-9)
    assert math.isclose(logprobs.grad.item(), slope, rel_tol=1e-5, abs_tol=1e-9)
