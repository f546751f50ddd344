"""Stacked experts: in the dtype of autocast for trainer, reference and sampler alike, and unchanged without it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from grpo.config.schema import LoraConfig
from grpo.kernels.attention import NAME
from grpo.kernels.head import IDENTITY
from grpo.models.experts import cast_weights, use_grpo_experts
from grpo.models.loading import prepare_model
from grpo.models.logprob_model import LogprobModel, probe_batch, use_grpo_attention
from grpo.models.lora import add_adapter, delta_weight, lora_layers
from grpo.models.weights import WeightReader, WorkingCopy
from tests.models.zoo import VOCABULARY, tiny_zoo_model

FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss"]
"""Experts without a bias, with other names, and with biases and transposed matrices."""
BATCH = probe_batch(VOCABULARY)


def experts_of(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if cast_weights(module))


def routed(experts: Any, tokens: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, and two experts with their weights for each token."""
    torch.manual_seed(1)
    weights, chosen = torch.randn(tokens, experts.num_experts).softmax(-1).topk(2)
    return torch.randn(tokens, experts.down_proj.shape[-1 if experts.is_transposed else -2]), chosen, weights


def grouped_dtypes(call: Any) -> set[torch.dtype]:
    """Return the dtypes of the operands of all grouped products in `call`."""
    seen: set[torch.dtype] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket is torch.ops.aten._grouped_mm:
                seen.update(part.dtype for part in args[:2])
            return func(*args, **(kwargs or {}))

    with Products():
        call()
    return seen


def logprobs(model: PreTrainedModel) -> Tensor:
    packed = model.config._attn_implementation == NAME
    return LogprobModel(model, uses_packed_attention=packed, temperature=1.0)(BATCH)[0]


def prepared(family: str) -> PreTrainedModel:
    model = prepare_model(tiny_zoo_model(family), IDENTITY)
    assert use_grpo_attention(model) == (family != "gpt_oss")
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_follow_autocast_and_nothing_else(family: str) -> None:
    plain, ours = (experts_of(tiny_zoo_model(family)) for _ in range(2))
    assert use_grpo_experts(ours)
    given = routed(ours)
    with torch.no_grad():
        assert torch.equal(ours(*given), plain(*given))
        exact = plain(*given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = ours(*given)
        for name in cast_weights(ours):
            getattr(plain, name).data = getattr(plain, name).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            by_hand = plain(*given)
    assert torch.equal(rounded, by_hand)
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 2e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_all_grouped_products_of_a_step_are_in_16_bits(family: str) -> None:
    model = prepared(family)
    found: list[Tensor] = []

    def step(enabled: bool = True) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            result = logprobs(model)
        weights = [parameter for parameter in model.parameters() if parameter.ndim == 3]
        found.append(torch.cat([part.flatten() for part in torch.autograd.grad(result.sum(), weights)]))

    assert grouped_dtypes(step) == {torch.bfloat16}
    assert grouped_dtypes(lambda: step(False)) == {torch.float32}
    assert found[0].dtype == torch.float32
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.98


def copied(model: PreTrainedModel, lora: LoraConfig | None = None) -> WorkingCopy:
    copy = WorkingCopy(model, WeightReader())
    if lora is not None:
        add_adapter(model, lora, base="")
        add_adapter(copy.model, lora, base="")
        copy.model.eval()
    copy.bind(model, torch.device("cpu"), compute_dtype=torch.bfloat16)
    copy.refresh()
    return copy


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_reads_experts_in_16_bits_and_computes_what_the_trainer_does(family: str) -> None:
    live = prepared(family)
    copy = copied(live)
    experts = experts_of(copy.model)
    assert {getattr(experts, name).dtype for name in cast_weights(experts)} == {torch.bfloat16}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logprobs(copy.model), logprobs(live))


def adapted() -> tuple[PreTrainedModel, WorkingCopy, Any, Any]:
    """Return a model with an adapter, its copy, and peft's layers of one mixture: the outer one, and the experts."""
    live = prepared("qwen3_moe")
    for parameter in live.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as in files of models
    copy = copied(live, LoraConfig(r=4))
    layers = [layer for name, layer in lora_layers(live) if ".layers.0.mlp.experts" in name]
    assert {layer.parameter_name for layer in layers} == {"gate_up_proj", "down_proj"}
    return live, copy, layers[0], layers[0].get_base_layer()


def step_of(live: PreTrainedModel, size: float) -> None:
    generator = torch.Generator().manual_seed(2)
    for _, layer in lora_layers(live):
        weight = layer.lora_B["default"].weight
        weight.data.copy_(torch.sign(torch.randn(weight.shape, generator=generator)) * size)


@torch.no_grad()
def test_an_adapter_of_experts_is_the_reference_at_first_and_the_same_for_the_sampler() -> None:
    live, copy, outer, experts = adapted()
    given = routed(experts)
    assert set(cast_weights(experts)) == {"gate_up_proj", "down_proj"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = outer(*given)
        assert torch.equal(first, experts(*given))
        for size in (0.0, 1e-2):
            step_of(live, size)
            assert torch.equal(logprobs(copy.model), logprobs(live))
        assert not torch.equal(outer(*given), first)
        for _, layer in lora_layers(live):
            layer._disable_adapters = True
        assert torch.equal(outer(*given), first)


@torch.no_grad()
def test_a_small_step_of_an_adapter_of_experts_arrives() -> None:
    """Most of it is lost where it is added to the weights, which are bfloat16 numbers, before they are rounded."""
    live, _, outer, experts = adapted()
    given = routed(experts, 2000)
    base = {name: getattr(experts, name).data for name in cast_weights(experts)}
    layers = {layer.parameter_name: layer for name, layer in lora_layers(live) if ".layers.0.mlp.experts" in name}

    def outputs() -> list[Tensor]:
        exact = outer(*given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            beside = outer(*given)
            for name, layer in layers.items():
                getattr(experts, name).data = base[name] + delta_weight(layer)
                layer._disable_adapters = True
            merged = outer(*given)
        for name, layer in layers.items():
            getattr(experts, name).data = base[name]
            layer._disable_adapters = False
        return [exact, beside, merged]

    before = outputs()
    step_of(live, 1e-5)
    exact, beside, merged = ((now - was).double() for now, was in zip(outputs(), before, strict=True))
    assert float(exact.abs().max()) > 0
    assert float((exact * beside).sum() / (exact * exact).sum()) == pytest.approx(1, abs=0.05)
    assert float((exact * merged).sum() / (exact * exact).sum()) < 0.5


def test_gradients_of_an_adapter_of_experts_are_those_of_float32() -> None:
    live, _, outer, experts = adapted()
    step_of(live, 1e-2)
    hidden, *rest = routed(experts)
    hidden.requires_grad_()
    parts = [parameter for name, parameter in outer.named_parameters() if "lora_" in name]

    def gradients(enabled: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            result = outer(hidden, *rest)
        return list(torch.autograd.grad(result.float().square().sum(), [hidden, *parts]))

    assert len(parts) == 4
    for mine, exact in zip(gradients(True), gradients(False), strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - exact).norm()) <= 3e-2 * float(exact.norm())
