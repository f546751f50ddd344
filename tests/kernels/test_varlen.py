"""Packed attention in one call, with a slow stand-in for the kernel on a CPU, and with the real one on a GPU."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from grpo.kernels import registry
from grpo.kernels.attention import GroupSpan, PackedLayout, packed_attention
from grpo.kernels.cuda.varlen import SHARED_KEYS, GatherKeys, is_available, is_supported
from tests.fakes import slow_varlen_attn, use_slow_varlen

GROUPS = ((7, (5, 3, 9)), (4, (2,)), (6, (1, 1, 8, 4)), (3, ()))
"""Tokens of the prompt, and of the completions, of each group: prompts have 4, 2, 5 and 1 copies."""


def spans() -> list[GroupSpan]:
    made, start = [], 0
    for prompt, completions in GROUPS:
        made.append(GroupSpan(start, prompt, completions))
        start = made[-1].start + made[-1].length
    return made


def random_tensors(heads: tuple[int, ...], tokens: int, **where: object) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, count, tokens, 8, generator=generator).to(**where).requires_grad_() for count in heads]  # type: ignore[call-overload]


def attended(tensors: list[Tensor], layout: PackedLayout, window: int | None, outside: list[Tensor]) -> list[Tensor]:
    """Return the result of packed attention and all gradients. Prompt 0 is outside the row if `outside` is given."""
    if outside:
        layout.elsewhere[0] = iter([(outside[0], outside[1])])
    result = packed_attention(*tensors, layout, 0.3, window)
    weights = torch.linspace(-1, 1, result.numel(), device=result.device).view_as(result)
    return [result.detach(), *torch.autograd.grad((result * weights).sum(), [*tensors, *outside])]


@pytest.mark.parametrize("split", [False, True], ids=["prompts in the row", "a prompt outside the row"])
@pytest.mark.parametrize("window", [None, 4])
def test_one_call_equals_a_call_per_completion(
    window: int | None, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_KERNELS", "torch")
    tokens = sum(span.length for span in spans()) - split * GROUPS[0][0]
    tensors = random_tensors((4, 2, 2), tokens)
    outside = random_tensors((2, 2), GROUPS[0][0]) if split else []
    device = torch.device("cpu")
    expected = attended(tensors, PackedLayout(spans(), device), window, outside)
    calls = use_slow_varlen(monkeypatch)
    ours = attended(tensors, PackedLayout(spans(), device), window, outside)
    assert calls == [sum(1 + len(completions) for _, completions in GROUPS) - split]
    for mine, other in zip(ours, expected, strict=True):
        assert float((mine - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max()))


def test_gradients_of_copies_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: each token's gradient is the number of its copies if that of every copy is 1."""
    use_slow_varlen(monkeypatch)
    layout = PackedLayout(spans(), torch.device("cpu"))
    [tensor] = random_tensors((2,), sum(span.length for span in spans()))
    gathered = GatherKeys.apply(tensor, layout.varlen_plan, torch.float32, [])
    assert len(gathered) == sum(prompt * (1 + len(lengths)) + sum(lengths) for prompt, lengths in GROUPS)
    gathered.sum().backward()
    expected = [number for prompt, lengths in GROUPS for number in [1 + len(lengths)] * prompt + [1] * sum(lengths)]
    assert tensor.grad is not None and tensor.grad[0, 0, :, 0].tolist() == expected


def test_which_devices_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu, head = torch.device("cpu"), torch.device("cuda", 0), torch.empty(1, 2, 3, 64)
    assert not is_available(cpu)
    assert not is_supported(head, head) and is_supported(head.bfloat16(), head.bfloat16())
    assert not is_supported(head.bfloat16(), head[..., :32].bfloat16())
    assert not is_supported(head[..., :60].bfloat16(), head[..., :60].bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_supported(head, head)  # rotated queries are float32 under autocast
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(registry, "_failed", {})
    assert is_available(gpu)
    capability = (7, 5)
    assert not is_available(gpu)
    capability = (9, 0)
    registry.switch_off("varlen_attention", "of this test")
    assert not is_available(gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("split", [False, True])
def test_the_real_kernel(window: int | None, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 against float32 by padded calls: 2^-8 is one rounding; results and gradients have a few of them."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    device = torch.device("cuda", 0)
    tokens = sum(span.length for span in spans()) - split * GROUPS[0][0]
    exact = random_tensors((4, 2, 2), tokens, device=device)
    outside = random_tensors((2, 2), GROUPS[0][0], device=device) if split else []
    narrow, narrow_outside = (
        [tensor.detach().bfloat16().requires_grad_() for tensor in tensors] for tensors in (exact, outside)
    )
    rounded, rounded_outside = (
        [tensor.detach().float().requires_grad_() for tensor in tensors] for tensors in (narrow, narrow_outside)
    )
    expected = attended(rounded, PackedLayout(spans(), device), window, rounded_outside)
    ours = attended(narrow, PackedLayout(spans(), device), window, narrow_outside)
    for mine, other in zip(ours, expected, strict=True):
        assert float((mine.float() - other).norm()) <= 2e-2 * float(other.norm())


@pytest.mark.gpu
def test_the_stand_in_is_the_kernel() -> None:
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    layout = PackedLayout(spans(), device)
    plan = layout.varlen_plan
    query, key = (
        torch.randn(len(index), heads, 64, device=device).bfloat16()
        for index, heads in ((torch.empty(sum(span.length for span in spans())), 4), (plan.keys_R, 2))
    )
    for window in ((-1, 0), (3, 0)):
        real = varlen_attn(
            query, key, key, plan.query_starts, plan.key_starts, plan.longest, plan.longest_keys,
            scale=0.1, window_size=window, **SHARED_KEYS,
        )  # fmt: skip
        slow = slow_varlen_attn(
            *(tensor.cpu().float() for tensor in (query, key, key)), plan.query_starts.cpu(), plan.key_starts.cpu(),
            plan.longest, plan.longest_keys, scale=0.1, window_size=window, enable_gqa=True,
        )  # fmt: skip
        assert isinstance(real, Tensor)
        assert torch.allclose(real.float().cpu(), slow, atol=2e-2)
