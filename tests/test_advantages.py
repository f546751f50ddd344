import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.advantages import ADVANTAGES, group_advantages, overlong_penalty
from grpo.objectives.gdpo import per_reward_advantages
from grpo.objectives.reinforce import leave_one_out_advantages, whitened_advantages, whole_batch_advantages
from grpo.objectives.subsets import max_variance, most_reward_per_token, shortest


def test_by_hand() -> None:
    # mean 0.5; Bessel-corrected variance (4 * 0.25) / 3 = 1/3, std 0.57735; 0.5 / (0.57735 + 0.0001) = 0.865875
    got = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    assert torch.allclose(
        got, torch.tensor([[0.865875, -0.865875, -0.865875, 0.865875]], dtype=torch.float64), atol=1e-6
    )


def test_none_only_centres() -> None:
    got = group_advantages(torch.tensor([[3.0, 1.0], [0.0, 4.0]]), scale="none")
    assert got.tolist() == [[1.0, -1.0], [-2.0, 2.0]]


def test_batch_divides_by_the_std_of_all_rewards() -> None:
    rewards = torch.tensor([[3.0, 1.0], [0.0, 4.0]])
    # all four: mean 2, squares 1 + 1 + 4 + 4 = 10, / 3, std 1.825742
    expected = torch.tensor([[1.0, -1.0], [-2.0, 2.0]], dtype=torch.float64) / (1.8257418583505538 + 1e-4)
    assert torch.allclose(group_advantages(rewards, scale="batch"), expected)


def test_equal_rewards_give_exactly_zero_even_when_they_are_not_dyadic() -> None:
    for size in (2, 3, 6, 7, 12):
        for scale in ("group", "batch", "none"):
            assert (group_advantages(torch.full((3, size), 0.3, dtype=torch.float32), scale=scale) == 0).all()
            # Three times 0.1 in float64: their mean is not 0.1.
            assert (group_advantages(torch.full((3, size), 0.1, dtype=torch.float64), scale=scale) == 0).all()


def test_a_small_difference_is_a_difference() -> None:
    assert group_advantages(torch.tensor([[1.0, 1.0 + 1e-6]], dtype=torch.float64), scale="none")[0, 1] > 0


def test_a_reward_that_is_infinite_does_not_apply() -> None:
    got = group_advantages(torch.tensor([[1.0, float("inf"), 0.0]]), scale="none")
    assert got.tolist() == [[0.5, 0.0, -0.5]]


def test_a_missing_reward_is_left_out() -> None:
    got = group_advantages(torch.tensor([[1.0, float("nan"), 0.0, 1.0]]), scale="none")
    assert torch.allclose(got, torch.tensor([[1 / 3, 0.0, -2 / 3, 1 / 3]], dtype=torch.float64))
    assert group_advantages(torch.full((2, 3), float("nan"))).tolist() == [[0.0] * 3] * 2


def test_shift_and_scale_do_not_matter() -> None:
    torch.manual_seed(0)
    rewards = torch.rand(5, 8, dtype=torch.float64) * 100
    assert torch.allclose(group_advantages(rewards), group_advantages(rewards * 3 + 7), atol=1e-4)


def test_leave_one_out_by_hand() -> None:
    # 1 - (0 + 0 + 1) / 3 = 2/3; 0 - (1 + 0 + 1) / 3 = -2/3
    got = leave_one_out_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    assert torch.allclose(got, torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3]], dtype=torch.float64))
    # the unknown one is nobody's baseline: 1 - 0 = 1
    missing = leave_one_out_advantages(torch.tensor([[1.0, float("nan"), 0.0]]))
    assert missing.tolist() == [[1.0, 0.0, -1.0]]


def test_reinforce_plus_plus_by_hand() -> None:
    # all four: mean 2, std 1.825742; a flat group in it is not flat any more
    rewards = torch.tensor([[3.0, 1.0], [4.0, 4.0]])
    spread = torch.tensor([3.0, 1.0, 4.0, 4.0]).double().std()
    assert torch.allclose(whole_batch_advantages(rewards), (rewards.double() - 3) / (spread + 1e-4))
    # centred in the group first: 1 -1 | 0 0, std sqrt(2/3)
    expected = torch.tensor([[1.0, -1.0], [0.0, 0.0]], dtype=torch.float64) / ((2 / 3) ** 0.5 + 1e-4)
    assert torch.allclose(whitened_advantages(rewards), expected)


def test_gdpo_tells_apart_what_a_sum_hides() -> None:
    # One prompt, two rewards. Sums: 1 1 1 1: nothing to learn. Apart, the rare success stands out.
    right = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    tidy = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    assert (group_advantages(right + tidy) == 0).all()
    # Normalised: +-(1.5, -0.5, -0.5, -0.5) for both, opposite signs: with weights 2 and 1 what is left is `right`'s.
    got = per_reward_advantages({"right": right, "tidy": tidy}, {"right": 2.0, "tidy": 1.0})
    one = group_advantages(right)
    assert torch.allclose(got, one / (one.std() + 1e-4))
    assert (per_reward_advantages({"right": right, "tidy": tidy}, {"right": 1.0, "tidy": 1.0}) == 0).all()


def test_gdpo_leaves_out_what_does_not_apply() -> None:
    nan = float("nan")
    got = per_reward_advantages(
        {"a": torch.tensor([[1.0, 0.0, nan]]), "b": torch.tensor([[nan, nan, nan]])}, {"a": 1.0, "b": 1.0}
    )
    # Reward a gives +-0.5 / 0.7072 = +-0.70701. Their standard deviation is 0.99986, without the one without a reward.
    assert got[0, 2] == 0
    assert got[0, 0] == -got[0, 1] and abs(got[0, 0] - 0.70701 / (0.99986 + 1e-4)) < 1e-4


def test_subsets_by_hand() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 0.5, 0.6, 1.0]])
    lengths = torch.tensor([[9.0, 2.0, 8.0, 1.0], [1.0, 1.0, 6.0, 4.0]])
    assert shortest(rewards, lengths, 2).tolist() == [[1, 3], [0, 1]]
    # reward per token: 0 .5 .125 1 | 0 .5 .1 .25
    assert most_reward_per_token(rewards, lengths, 2).tolist() == [[1, 3], [1, 3]]
    assert max_variance(rewards, lengths, 2).tolist() == [[0, 3], [0, 3]]
    # three of 0 1 1 1: the 0 and any two; three of 0 .5 .6 1: variances .1667 (0 .5 1) and .1689 (0 .6 1)
    assert max_variance(rewards, lengths, 3).tolist() == [[0, 1, 3], [0, 2, 3]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 6), min_size=4, max_size=7), st.integers(2, 4))
def test_max_variance_is_the_best_of_all_subsets(rewards: list[int], size: int) -> None:
    import itertools

    values = torch.tensor([rewards], dtype=torch.float64)
    [chosen] = max_variance(values, torch.ones_like(values), size).tolist()
    best = max(
        values[0, list(subset)].var(correction=0) for subset in itertools.combinations(range(len(rewards)), size)
    )
    assert abs(values[0, chosen].var(correction=0) - best) < 1e-12


def test_overlong_penalty_by_hand() -> None:
    assert overlong_penalty(torch.tensor([3.0, 6.0, 7.0, 10.0, 12.0]), 10, 4).tolist() == [0, 0, -0.25, -1, -1]


groups = st.integers(2, 6).flatmap(
    lambda size: st.lists(st.lists(st.integers(-8, 8), min_size=size, max_size=size), min_size=1, max_size=4)
)


@pytest.mark.parametrize("name", [name for name in ADVANTAGES.names() if name != "gdpo"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(rewards=groups, shift=st.integers(-5, 5), scale=st.floats(1, 4), seed=st.integers(0, 99))
def test_what_holds_for_every_estimator(name: str, rewards: list, shift: int, scale: float, seed: int) -> None:
    """Invariance to shifts of the rewards, equivariance to scaling and to the order of completions."""
    estimate = ADVANTAGES.get(name)
    rewards_PG = torch.tensor(rewards, dtype=torch.float64)
    plain = estimate(rewards_PG)
    assert torch.allclose(estimate(rewards_PG + shift), plain, atol=1e-9)
    scaled = estimate(rewards_PG * scale)
    if name == "rloo":
        assert torch.allclose(scaled, plain * scale, atol=1e-9)
    else:  # the 1e-4 beside the standard deviation is what is left
        assert torch.allclose(scaled, plain, rtol=1e-3, atol=1e-9)
    order = torch.randperm(rewards_PG.shape[1], generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(estimate(rewards_PG[:, order]), plain[:, order], atol=1e-9)
    if name != "reinforce_plus_plus":
        assert torch.allclose(plain.sum(1), torch.zeros(len(rewards), dtype=torch.float64), atol=1e-9)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 5).flatmap(
        lambda size: st.lists(st.lists(st.floats(), min_size=size, max_size=size), min_size=1, max_size=3)
    )
)
def test_any_reward_vector_gives_finite_advantages(rows: list[list[float]]) -> None:
    """All float64 values, also NaN, infinities and 1e308."""
    for scale in ("group", "batch", "none"):
        advantages = group_advantages(torch.tensor(rows, dtype=torch.float64), scale=scale)
        assert bool(torch.isfinite(advantages.float()).all()), (scale, advantages)
