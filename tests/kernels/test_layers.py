"""Layers computed from a description: logprobs and gradients equal those of the modules; the model is unchanged."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.config.schema import LoraConfig
from grpo.kernels import layers
from grpo.kernels.cpu import fused_layer
from grpo.kernels.cpu.fused_ops import rms_norm, swiglu
from grpo.models.families import FAMILIES, describe
from grpo.models.logprob_model import LogprobModel, probe_batch
from grpo.models.lora import add_adapter
from grpo.packing import PackedBatch, pack
from tests.fakes import group, tiny_model


def long_batch(vocabulary: int = 40) -> PackedBatch:
    """Two groups of more than 64 tokens together, the minimum for C."""
    torch.manual_seed(3)
    ids = [torch.randint(2, vocabulary, (length,)).tolist() for length in (9, 40, 22, 6, 31)]
    return pack([group(0, ids[0], ids[1:3]), group(1, ids[3], ids[4:])], torch.ones(2, 2), max_tokens=1000)[0]


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Set norms and biases to values other than 1 and 0, so that a missing one is detected."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name or "lora" in name:
            parameter.data += (0.1 if "lora" in name else 0.3) * torch.randn(parameter.shape, generator=generator)
    return model


def learned(model: PreTrainedModel, batch: PackedBatch, *, uses_kernels: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logprob_model = LogprobModel(model, uses_packed_attention=True, temperature=1.0, uses_kernels=uses_kernels)
    logprobs, _ = logprob_model(batch)
    (logprobs.float() * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: PreTrainedModel, batch: PackedBatch, close: float = 1e-5) -> None:
    (ours, gradients), (theirs, expected) = (learned(model, batch, uses_kernels=way) for way in (True, False))
    assert float((ours - theirs).abs().max()) <= close * max(1.0, float(theirs.abs().max()))
    assert gradients.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        distance = float((gradients[name] - gradient).abs().max())
        assert distance <= close * max(1.0, float(gradient.abs().max())), name


CASES = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral with a window": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "smollm3 with a layer without rotation": ("smollm3", {"no_rope_layers": [1, 0]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_modules_logprobs_and_gradients(way: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, changes = CASES[case]
    model = spread(tiny_model(family, **changes))
    called: list[int] = []
    compute = layers.hidden_states
    monkeypatch.setattr(layers, "hidden_states", lambda *args, **kwargs: called.append(1) or compute(*args, **kwargs))
    for batch in (probe_batch(40), long_batch()):
        assert_same(model, batch)
    assert len(called) == 2


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj"], ["gate_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_adapters(way: str, family: str, targets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[int] = []
    compute = fused_layer.fused_layer
    monkeypatch.setattr(fused_layer, "fused_layer", lambda *a, **k: fused.append(1) or compute(*a, **k))
    model = tiny_model(family, spread=2.0)
    adapter = add_adapter(model, LoraConfig(r=4, target_modules=targets, use_rslora=True), base="")
    spread(model)
    described = describe(model)
    assert described is not None and described.layers[0].has_adapter
    assert_same(model, long_batch(), close=5e-5)  # both ways round: gradients of 100 go through the adapters
    assert bool(fused) == (way == "compiled")
    with adapter.disable_adapter():
        described = describe(model)
        assert described is not None and not described.layers[0].has_adapter


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_under_autocast(way: str, family: str) -> None:
    model = spread(tiny_model(family, spread=2.0))  # outside: autocast keeps what it casts while it lasts
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(model, long_batch(), close=5e-2)


def test_frozen_weights_get_no_gradient(way: str) -> None:
    model = tiny_model("qwen2")
    _, everything = learned(model, long_batch(), uses_kernels=True)
    model.model.layers[1].self_attn.v_proj.weight.requires_grad_(False)
    _, partly = learned(model, long_batch(), uses_kernels=True)
    assert everything.keys() - partly.keys() == {"model.layers.1.self_attn.v_proj.weight"}
    assert all(torch.equal(gradient, everything[name]) for name, gradient in partly.items())


def test_checkpointing_changes_no_bit(way: str) -> None:
    model = tiny_model("qwen2")
    plain = learned(model, long_batch(), uses_kernels=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    described = describe(model)
    assert described is not None and described.checkpointed
    checkpointed = learned(model, long_batch(), uses_kernels=True)
    assert torch.equal(plain[0], checkpointed[0])
    assert all(torch.equal(gradient, checkpointed[1][name]) for name, gradient in plain[1].items())


def test_the_model_stays_what_it_was() -> None:
    model = tiny_model("llama")
    before = [(name, type(module)) for name, module in model.named_modules()]
    learned(model, long_batch(), uses_kernels=True)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(kind.__module__.startswith(("torch.", "transformers.")) for _, kind in before)


def test_a_weight_that_was_replaced_is_used() -> None:
    model, batch = tiny_model("qwen2"), long_batch()
    before, _ = learned(model, batch, uses_kernels=True)
    twin = copy.deepcopy(model)
    twin.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert torch.equal(learned(model, batch, uses_kernels=True)[0], before)
    changed, _ = learned(twin, batch, uses_kernels=True)
    assert not torch.allclose(changed, before)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(twin.model.layers[0].mlp.up_proj.weight.data.clone())
    assert torch.equal(learned(model, batch, uses_kernels=True)[0], changed)


def test_what_is_not_described() -> None:
    assert all(describe(tiny_model(family)) is not None for family in FAMILIES)
    assert describe(tiny_model("gemma3")) is None
    model = tiny_model("llama")
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert describe(model) is None
    hook.remove()
    assert describe(model) is not None
    model.model.layers[0].mlp.down_proj = torch.nn.Identity()
    assert describe(model) is None
    relu = tiny_model("llama", hidden_act="relu")
    assert describe(relu) is None


def test_a_norm_of_two_numbers(way: str) -> None:
    # rms(3, 4) = sqrt(12.5) = 3.5355
    normed = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    assert torch.allclose(normed, torch.tensor([[0.848528, 2.262742]]))


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5, 6)])
def test_gradients_equal_finite_differences(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
