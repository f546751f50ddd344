import torch

from grpo.advantages import group_advantages


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
    for size in (2, 6, 7, 12):
        for scale in ("group", "batch", "none"):
            assert (group_advantages(torch.full((3, size), 0.3, dtype=torch.float32), scale=scale) == 0).all()


def test_a_missing_reward_is_left_out() -> None:
    got = group_advantages(torch.tensor([[1.0, float("nan"), 0.0, 1.0]]), scale="none")
    assert torch.allclose(got, torch.tensor([[1 / 3, 0.0, -2 / 3, 1 / 3]], dtype=torch.float64))
    assert group_advantages(torch.full((2, 3), float("nan"))).tolist() == [[0.0] * 3] * 2


def test_shift_and_scale_do_not_matter() -> None:
    torch.manual_seed(0)
    rewards = torch.rand(5, 8, dtype=torch.float64) * 100
    assert torch.allclose(group_advantages(rewards), group_advantages(rewards * 3 + 7), atol=1e-4)
