"""The fused decoder layer, the blocks of the head and products with bfloat16 panels equal the reference in torch."""

import contextlib

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from grpo.kernels import head
from grpo.kernels.cpu import fused_layer, ops
from grpo.kernels.cpu.compiler import library
from grpo.kernels.cpu.panels import Panels
from grpo.kernels.cpu.panels import library as panels_library
from grpo.logprobs import token_logprobs
from grpo.models.logprob_model import LogprobModel, probe_batch, use_grpo_attention

needs_c = pytest.mark.skipif(library() is None, reason="no C compiler")


def small_model(kind: type) -> PreTrainedModel:
    torch.manual_seed(0)
    config = kind(
        vocab_size=211,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def logprobs_and_gradients(
    model: PreTrainedModel, *, in_place: bool, bf16: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    logprob_model = LogprobModel(model, uses_packed_attention=use_grpo_attention(model), temperature=0.9)
    logprob_model.accumulate_grads_inplace = in_place
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        logprobs, _ = logprob_model(probe_batch(211))
    (logprobs * torch.arange(1, len(logprobs) + 1)).sum().backward()
    return logprobs.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def furthest(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((got[name] - one).norm() / one.norm()) for name, one in expected.items())


@needs_c
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("in_place", [False, True])
def test_fused_layer_gives_the_reference_in_float32(
    monkeypatch: pytest.MonkeyPatch, kind: type, in_place: bool
) -> None:
    model = small_model(kind)
    monkeypatch.setenv("GRPO_KERNELS", "torch")
    expected, gradients = logprobs_and_gradients(model, in_place=False)
    monkeypatch.setenv("GRPO_KERNELS", "auto")
    calls: list[int] = []
    real = fused_layer.fused_layer
    monkeypatch.setattr(fused_layer, "fused_layer", lambda *a, **k: calls.append(1) or real(*a, **k))
    got, own = logprobs_and_gradients(model, in_place=in_place)
    assert calls
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert furthest(own, gradients) < 1e-5


@needs_c
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_under_autocast_the_fused_layer_is_as_near_to_float32_as_the_modules(
    monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    model = small_model(kind)
    monkeypatch.setenv("GRPO_KERNELS", "torch")
    expected, gradients = logprobs_and_gradients(model, in_place=False)
    modules, module_gradients = logprobs_and_gradients(model, in_place=False, bf16=True)
    monkeypatch.setenv("GRPO_KERNELS", "auto")
    got, own = logprobs_and_gradients(model, in_place=True, bf16=True)
    assert not torch.equal(got, expected)
    assert float((got - expected).abs().max()) < 2 * float((modules - expected).abs().max())
    assert furthest(own, gradients) < 1.5 * furthest(module_gradients, gradients)


@pytest.mark.skipif(panels_library() is None, reason="no C compiler")
@pytest.mark.parametrize("rows", [1, 5, 12, 13, 16, 70, 80, 150])
@pytest.mark.parametrize("inputs", [34, 96])
def test_bfloat16_panels_round_inputs_only(rows: int, inputs: int) -> None:
    """Matrix registers, where the processor has them, take inputs by 32 and rows by 16."""
    torch.manual_seed(0)
    states, weight, bias = torch.randn(rows, inputs), torch.randn(150, inputs), torch.randn(150)
    panels = Panels.of(weight, torch.bfloat16)
    got = panels.product(states, bias)
    expected = states.bfloat16().float() @ weight.bfloat16().float().T + bias
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(panels.product(states[-1:], bias), got[-1:])  # the same whatever rows are beside it


@pytest.mark.parametrize("bytes_at_a_time", [1, 4 * 7 * 64, 10**6])
def test_blocks_of_the_vocabulary_give_the_plain_logprobs(
    monkeypatch: pytest.MonkeyPatch, bytes_at_a_time: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", bytes_at_a_time)
    hidden = torch.randn(7, 16, dtype=torch.float64)
    weight, targets = torch.randn(201, 16, dtype=torch.float64), torch.tensor([0, 63, 64, 127, 128, 199, 200])
    leaves = [tensor.float().requires_grad_() for tensor in (hidden, weight)]
    plain = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    logprobs, entropies = token_logprobs(*leaves, targets, 0.8)
    every = (plain[0] @ plain[1].T / 0.8).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), every[range(7), targets], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies.double(), -(every.exp() * every).sum(-1), atol=1e-5, rtol=1e-5)
    factors = torch.arange(1.0, 8.0)
    (logprobs * factors).sum().backward()
    (every[range(7), targets] * factors).sum().backward()
    for leaf, one in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad.double(), one.grad, atol=1e-4, rtol=1e-5)


@needs_c
def test_bfloat16_rounds_to_nearest_even_and_keeps_nan() -> None:
    values = torch.cat([torch.randn(95), torch.tensor([float("nan"), float("inf"), 1 + 2**-8, 1 + 3 * 2**-8, 0.0])])
    mixed = torch.empty(1, 100 + 200, dtype=torch.bfloat16)
    zeros = torch.zeros(1, 1, 100)
    ops.join_heads(values.view(1, 1, 100), zeros, zeros.clone(), None, None, mixed)
    torch.testing.assert_close(mixed[0, :100], values.bfloat16(), equal_nan=True, atol=0, rtol=0)
