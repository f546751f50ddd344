"""Chunks of a recurrence: by hand, and against the recurrence token by token with its gradients."""

from functools import partial

import pytest
import torch
from torch import Tensor

from grpo.kernels import reference
from grpo.kernels.recurrent import delta_rule, delta_rule_step, join, selective_scan

T, K, R, N, D = 7, 2, 3, 4, 5
"""Tokens, key heads, value heads of each, sizes of a key and of a value."""


def parts(rates: bool) -> list[Tensor]:
    torch.manual_seed(0)
    query, key, value = torch.randn(T, K, N), torch.randn(T, K, N), torch.randn(T, K * R, D)
    log_decay = -torch.rand(T, K * R)
    made = [query, key, value, log_decay, *([torch.rand(T, K * R)] if rates else [])]
    return [part.requires_grad_() for part in made]


def by_token(made: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [T, K * R * D] and the state [K, N, R * D], head by head."""
    query, key, value, log_decay, *rates = made
    found = []
    for head in range(K * R):
        own = state[head // R][:, head % R * D : (head % R + 1) * D]
        rate = rates[0][:, head] if rates else None
        found.append(
            reference.recurrence(query[:, head // R], key[:, head // R], value[:, head], log_decay[:, head], rate, own)
        )
    states = [torch.cat([s for _, s in found[first : first + R]], dim=1) for first in range(0, K * R, R)]
    return torch.cat([output for output, _ in found], dim=1), torch.stack(states)


def test_two_tokens_by_hand() -> None:
    """One head of size 1: S = 2 before; decay 1/2, then 1/4; keys 1 and 3; values 5 and 7; rates 1/2 and 1."""
    query, key = torch.tensor([1.0, 10.0]).view(2, 1, 1), torch.tensor([1.0, 3.0]).view(2, 1, 1)
    value, decay = torch.tensor([5.0, 7.0]).view(2, 1, 1), torch.tensor([0.5, 0.25]).log().view(2, 1)
    rate, before = torch.tensor([0.5, 1.0]).view(2, 1), torch.full((1, 1, 1, 1), 2.0)
    # delta rule: S = 1, u = (5 - 1) / 2 = 2, S = 3; then S = 3/4, u = 7 - 9/4 = 19/4, S = 3/4 + 57/4 = 15
    inputs = join(query, key, value, decay, rate)[None]
    output, state = delta_rule(inputs, before, keys=1, shared=1, size=1, beta=True)
    assert output.flatten().tolist() == pytest.approx([3, 150]) and float(state) == pytest.approx(15)
    # state space: S = 1 + 5 = 6; then 6/4 + 3 * 7 = 22.5
    inputs = join(query, key, value, decay)[None]
    output, state = delta_rule(inputs, before, keys=1, shared=1, size=1, beta=False)
    assert output.flatten().tolist() == pytest.approx([6, 225]) and float(state) == pytest.approx(22.5)


@pytest.mark.parametrize("rates", [True, False])
def test_chunks_equal_tokens(rates: bool) -> None:
    """Two chunks of 4 and 3 tokens in a row of two, of which the other row has padding."""
    made, shape = parts(rates), {"keys": K, "shared": R, "size": N, "beta": rates}
    first = torch.randn(K, N, R * D).requires_grad_()
    inputs = torch.stack([join(*made), join(*made)])
    padded = torch.cat([inputs[:, 4:], torch.zeros(2, 2, inputs.shape[-1])], dim=1)
    before, state = delta_rule(inputs[:, :4], first.expand(2, -1, -1, -1), **shape)
    after, state = delta_rule(padded, state, **shape)
    output = torch.cat([before, after[:, :3]], dim=1)
    expected, last = by_token(made, first)
    weights = torch.randn(T, K * R * D)
    for row in range(2):
        assert torch.allclose(output[row], expected, atol=1e-5)
        assert torch.allclose(state[row], last, atol=1e-5)
    own = torch.autograd.grad((output[1] * weights).sum() + state[1].square().sum(), [*made, first])
    plain = torch.autograd.grad((expected * weights).sum() + last.square().sum(), [*made, first])
    for ours, theirs in zip(own, plain, strict=True):
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


@pytest.mark.parametrize("rates", [True, False])
def test_steps_equal_tokens(rates: bool) -> None:
    made, state = parts(rates), torch.randn(2, K, N, R * D)
    expected = [by_token(made, row) for row in state]
    inputs = join(*made).detach()
    for token in range(T):
        output = delta_rule_step(inputs[token].expand(2, -1), state, K, R, N, rates)
        for row in range(2):
            assert torch.allclose(output[row], expected[row][0][token], atol=1e-5)
    for row in range(2):
        assert torch.allclose(state[row], expected[row][1], atol=1e-5)


def test_selective_scan_by_hand() -> None:
    """One channel, one number: A = -ln 2, steps 1 and 2, so factors 1/2 and 1/4; h = 4 before."""
    scan = partial(selective_scan, log_rates_EN=torch.tensor([[0.5]]).log())
    # x, step, B, C: h = 4/2 + 1 * 3 * 2 = 8, o = 8 * 10; then h = 8/4 + 2 * 5 * 1 = 12, o = 12 * 1
    inputs = torch.tensor([[[3.0, 1.0, 2.0, 10.0], [5.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    output, state = scan(inputs, torch.full((1, 1, 1), 4.0))
    assert output[0, :2, 0].tolist() == pytest.approx([80, 12])
    assert float(state) == pytest.approx(12)  # the last token is padding
    assert torch.allclose(scan(inputs, None)[0], scan(inputs, torch.zeros(1, 1, 1))[0])
