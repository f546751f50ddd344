"""Parity with TRL's GRPOTrainer: equal numbers, and the correct ones for intended differences."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason='parity is measured against TRL: pip install -e ".[benchmark]"')

from benchmarks.parity import (
    LEARNING_RATE,
    Case,
    Outcome,
    cases,
    compare,
    expert_cases,
    make_model,
    masked_factor,
    random_cases,
    run_ours,
    run_trl,
    total_norm,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore"),  # TRL's: experimental features, names that go away
]
LOSSES = sorted({case.loss_type for case in cases()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path)
    return tmp_path


def apart(ours: dict, theirs: dict, factor: float = 1.0) -> float:
    """Return |ours * factor - theirs| / |theirs| over all parameters."""
    return total_norm({name: ours[name] * factor - theirs[name] for name in theirs}) / total_norm(theirs)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_and_gradients_are_trls(loss_type: str) -> None:
    """Two passes over fixed completions, the second off-policy: every setting of benchmarks/parity.py.

    Where a pass has three optimizer steps, each of ours starts from TRL's weights: over six, rounding grows.
    """
    rows = [compare(case, forced=case.mini_batches > 2) for case in cases() if case.loss_type == loss_type]
    assert rows
    for row in rows:
        assert max(row["loss"], row["gradient_norm"], row["gradient"]) <= 1e-5, row
        assert loss_type in ("sapo", "vespo") or row["clipped"] > 0 or "epsilon_high" not in row["setting"], row


def test_random_settings_are_trls_too() -> None:
    """The first 24 of the 300 of benchmarks/parity.py."""
    for case in random_cases(24):
        row = compare(case, forced=True)
        assert max(row["loss"], row["gradient_norm"], row["gradient"]) <= 1e-5, row


@pytest.mark.parametrize("case", expert_cases(), ids=lambda case: case.setting)
def test_the_load_balancing_loss_is_trls(case: Case) -> None:
    row = compare(case)
    assert max(row["loss"], row["gradient_norm"], row["gradient"]) <= 1e-5, row


def test_five_adamw_steps_end_with_equal_weights() -> None:
    row = compare(Case("dapo", {"beta": 0.3}, steps=5, optimizer="adamw"))
    assert row["clipped"] > 0  # it went off-policy on the way
    # AdamW divides each gradient by its own size, so the smallest ones, which are mostly rounding, may move a weight by
    # anything up to a step: what all weights moved is compared, and no weight may be off by a hundredth of a step of
    # 1e-3.
    assert row["moved"] <= 1e-5
    assert row["weights"] <= 1e-5  # 1.1e-6 was seen


# --- Intended differences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "dr_grpo", "luspo"])
def test_a_masked_completion_dilutes_trls_mean_and_not_ours(loss_type: str, folder: Path) -> None:
    """Masked completions are excluded from the loss and from its denominator, as in DAPO's token mean. TRL's means per
    completion keep them in the denominator, so its step shrinks with the number of truncated completions. The expected
    gradient is that of the remaining completions alone."""
    case = Case(loss_type, {"beta": 0.3, "mask_truncated_completions": True}, steps=1)
    ours, theirs = run_ours(case, folder), run_trl(case, folder)
    factor = masked_factor(loss_type)
    assert factor < 1
    assert apart(ours.gradients[0], theirs.gradients[0], factor) <= 1e-5
    if loss_type == "sapo":
        assert abs(ours.losses[0] - exact_sapo(folder, 1)[0]) < 1e-6


def test_cispo_without_a_cap_scales_every_gradient_of_trl_down(folder: Path) -> None:
    """epsilon_high null: TRL caps the ratio at epsilon, 0.2, the ratio 1 of on-policy tokens included, so that every
    gradient is a fifth of REINFORCE's. On-policy CISPO is REINFORCE (MiniMax-M1, arXiv 2506.13585, eq. 4): ours."""
    case = Case("cispo", {"beta": 0.0}, steps=1, trl_defaults=True)
    ours, theirs = run_ours(case, folder), run_trl(case, folder)
    reinforce = run_ours(Case("reinforce_plus_plus", {"beta": 0.0, "advantage_estimator": "group"}, steps=1), folder)
    assert apart(ours.gradients[0], reinforce.gradients[0]) <= 1e-6
    assert apart(reinforce.gradients[0], theirs.gradients[0], 0.2) <= 1e-5


def test_bnpo_of_trl_depends_on_micro_batches_and_ours_does_not(folder: Path) -> None:
    """TRL's bnpo divides by the tokens of a micro-batch: accumulating gradients over two of them is another objective.
    Ours divides by the tokens of the whole mini-batch, for any micro-batches."""

    def gradient(outcome: Outcome) -> dict:
        return outcome.gradients[0]

    one = Case("bnpo", {"beta": 0.3}, steps=1)
    two = replace(one, micro_batches=2)
    assert apart(gradient(run_ours(two, folder)), gradient(run_ours(one, folder))) <= 1e-5
    assert apart(gradient(run_trl(two, folder)), gradient(run_trl(one, folder))) > 1e-2
    assert apart(gradient(run_ours(two, folder)), gradient(run_trl(one, folder))) <= 1e-5


def test_the_load_of_trl_is_that_of_a_micro_batch_and_ours_that_of_the_step(tmp_path: Path) -> None:
    """The loss is the product of two means. TRL takes both over a micro-batch, so accumulating gradients over two of
    them is another objective; here, the shares of the experts are those of the whole optimizer step."""
    make_model(tmp_path, experts=True)

    def gradient(outcome: Outcome) -> dict:
        return outcome.gradients[0]

    one = Case("dapo", {"beta": 0.0, "router_aux_loss_coef": 5.0}, steps=1, experts=True)
    two = replace(one, micro_batches=2)
    assert apart(gradient(run_ours(two, tmp_path)), gradient(run_ours(one, tmp_path))) <= 1e-5
    assert apart(gradient(run_trl(two, tmp_path)), gradient(run_trl(one, tmp_path))) > 1e-2
    assert apart(gradient(run_ours(two, tmp_path)), gradient(run_trl(one, tmp_path))) <= 1e-5


def test_rewards_that_are_all_equal_teach_trl_rounding_noise_and_us_nothing(folder: Path) -> None:
    """Six completions with the same reward 0.3. In float32 the mean of six times 0.3 is not 0.3. TRL divides the
    rounding error by 1e-4 and takes a step. Our advantages are exactly 0, and no step is taken.
    """
    case = Case("dapo", {"beta": 0.0}, steps=1, shape=(2, 6), flat=0.3)
    assert total_norm(run_trl(case, folder).gradients[0]) > 1e-5
    ours = run_ours(case, folder)
    assert ours.gradients == []


def test_trls_share_of_flat_groups_is_blind_where_rewards_are_scaled_by_the_batch(folder: Path) -> None:
    """All completions of one prompt get reward 0, those of the other 1, so every group is flat. TRL uses the
    deviation of the batch and reports none. reward/zero_std_fraction counts groups whose advantages are 0
    (grpo/run/step_metrics.py).
    """
    from grpo.advantages import group_advantages

    case = Case("dapo", {"beta": 0.3, "scale_rewards": "batch"}, steps=1, shape=(2, 6), flat=0.5, contrast=0.5)
    assert run_trl(case, folder).flat_groups == 0.0
    rewards_PG = torch.tensor(case.rewards()["first"]).reshape(case.shape)
    assert (group_advantages(rewards_PG, scale="batch") == 0).all()


# --- Rounding or a real difference -----------------------------------------------------------------------------


def exact_sapo(folder: Path, steps: int) -> list[float]:
    """The losses of SAPO with KL and the overlong filter in float64, computed one completion at a time."""
    from transformers import AutoModelForCausalLM

    case = Case("sapo", {"beta": 0.3, "mask_truncated_completions": True})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    first = copy.deepcopy(model)
    rewards = case.rewards()
    total = torch.tensor([a + 0.5 * b for a, b in zip(rewards["first"], rewards["second"], strict=True)]).double()
    total_PG = total.reshape(case.shape)
    advantages_PG = (total_PG - total_PG.mean(1, keepdim=True)) / (total_PG.std(1, keepdim=True) + 1e-4)
    samples = [
        (group.prompt.token_ids, completion.token_ids, float(advantages_PG[p, s]))
        for p, group in enumerate(case.groups())
        for s, completion in enumerate(group.completions)
        if completion.ended
    ]

    def logprobs(of: torch.nn.Module, prompt: tuple, completion: list) -> torch.Tensor:
        logits = of(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]

    losses = []
    for _ in range(steps):
        loss = torch.zeros((), dtype=torch.float64)
        for prompt, completion, advantage in samples:
            new = logprobs(model, prompt, completion)
            with torch.no_grad():
                old = logprobs(
                    first, prompt, completion
                )  # also the reference: both are the policy before the first step
            ratio, tau = (new - old).exp(), 1.0 if advantage > 0 else 1.05
            kl = (old - new).exp() - (old - new) - 1
            loss = loss + (-torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage + 0.3 * kl * ratio).mean()
        losses.append(float(loss / len(samples)))
        model.zero_grad()
        (loss / len(samples)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * masked_factor("sapo") * parameter.grad
    return losses


def test_the_largest_difference_of_a_loss_is_rounding(folder: Path) -> None:
    """sapo, beta 0.3, masked: two losses of 0.0513 differ by 1.5e-6, which is 3e-5 of them. Its terms of about 2.3 in
    size cancel; in float64 the loss lies between the two, as near to each as float32 allows for such terms.
    """
    case = Case("sapo", {"beta": 0.3, "mask_truncated_completions": True}, factor=masked_factor("sapo"))
    ours, theirs = run_ours(case, folder).losses, run_trl(case, folder).losses
    for mine, other, exact in zip(ours, theirs, exact_sapo(folder, 2), strict=True):
        assert math.isclose(mine, exact, abs_tol=2.3 * 1e-6)
        assert math.isclose(other / case.factor, exact, abs_tol=2.3 * 1e-6)
