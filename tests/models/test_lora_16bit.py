"""LoRA in 16 bits: a small step of the adapter reaches the sampler. Merged into a bfloat16 weight, it would not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from grpo.config.schema import LoraConfig, RolloutConfig
from grpo.kernels import decode
from grpo.kernels.decode import FusedDecoder, WorkingLayer
from grpo.kernels.kv_cache import SlotCache
from grpo.models import lora_wide
from grpo.models.families import describe
from grpo.models.logprob_model import LogprobModel, probe_batch
from grpo.models.lora import add_adapter, lora_layers
from grpo.models.weights import WeightReader, WorkingCopy
from grpo.rollout.backbones import Backbone, KernelBackbone, ModuleBackbone, choose_backbone
from grpo.run.build import merged_adapter_line
from tests.fakes import tiny_model

LORA = LoraConfig(r=4, lora_alpha=8)
STEP = 1e-5
"""Size of each number of B after an artificial step: about one step of AdamW at this learning rate."""


def adapted(family: str = "qwen2") -> tuple[PreTrainedModel, WorkingCopy]:
    """Return a live model, whose base weights are bfloat16 numbers, and the copy that a sampler reads."""
    live = tiny_model(family, spread=2.0, hidden_size=64)
    for parameter in live.parameters():
        parameter.data = parameter.data.bfloat16().float()
    copy = WorkingCopy(live, WeightReader())
    add_adapter(live, LORA, base="")
    add_adapter(copy.model, LORA, base="")
    copy.model.eval()
    copy.bind(live, torch.device("cpu"), compute_dtype=torch.bfloat16)
    copy.refresh()
    return live, copy


def take_step(live: PreTrainedModel, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(live):
        weight = layer.lora_B["default"].weight
        weight.data.copy_(torch.sign(torch.randn(weight.shape, generator=generator)) * size)  # on any device


@torch.no_grad()
def sampled_logprobs(backbone: Backbone, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    ids = (torch.arange(4 * 24).reshape(4, 24) * 7 % 40).to(device)
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        backbone.refresh()
        hidden = backbone.prefill(ids, SlotCache(1, 32, backbone.cache_dtype)).flatten(0, 1)
        return backbone.logits(hidden).double().log_softmax(-1)


def arrived(wanted: Tensor, found: Tensor) -> float:
    """Return the part of the change `wanted` that is in `found`."""
    return float((wanted * found).sum() / (wanted * wanted).sum())


def changes(live: PreTrainedModel, *measures: Callable[[], Tensor]) -> list[Tensor]:
    before = [measure() for measure in measures]
    take_step(live, STEP)
    return [measure() - was for measure, was in zip(measures, before, strict=True)]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_small_step_reaches_the_native_engine(family: str) -> None:
    live, copy = adapted(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backbone, _ = choose_backbone(copy.model)
    assert isinstance(backbone, KernelBackbone)

    def sampler() -> Tensor:
        copy.refresh()
        return sampled_logprobs(backbone, torch.bfloat16)

    exact, found = changes(live, lambda: sampled_logprobs(ModuleBackbone(live), torch.float32), sampler)
    assert float(exact.abs().max()) > 0
    assert 0.99 < arrived(exact, found) < 1.01


def test_a_layer_and_its_gradients_are_those_of_float32() -> None:
    """Against W x + s B A x, with the rounding of bfloat16."""
    live, _ = adapted()
    take_step(live, 100 * STEP)
    layer = next(layer for _, layer in lora_layers(live))
    low, high, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    x, upstream = random_rows(low.shape[1], 0).requires_grad_(), random_rows(high.shape[0], 1)

    def gradients(result: Tensor) -> list[Tensor]:
        return [result.detach(), *torch.autograd.grad((result * upstream).sum(), [x, low, high])]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(layer(x))
    base = layer.get_base_layer()
    theirs = gradients(F.linear(x, base.weight, base.bias) + scale * F.linear(F.linear(x, low), high))
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).norm()) <= 1e-2 * float(other.norm())


def test_a_layer_of_modules_keeps_a_small_adapter_until_its_sum_is_rounded() -> None:
    """At this size, peft's sum with a rounded product loses most of the term; ours has all of it before rounding."""
    live, _ = adapted()
    take_step(live, STEP)
    for _, layer in lora_layers(live):
        low, high, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        base, x = layer.get_base_layer(), random_rows(low.shape[1], 0)
        term = scale * F.linear(F.linear(x, low), high).detach()
        rows, weight = x.bfloat16().flatten(0, -2), base.weight.bfloat16()
        inner, narrow = F.linear(rows, low.bfloat16()), (scale * high).bfloat16()
        with torch.no_grad():
            ours, without = (
                lora_wide.wide_sum(rows, part, narrow, weight, base.bias) for part in (inner, torch.zeros_like(inner))
            )
            with torch.autocast("cpu", dtype=torch.bfloat16):
                with_peft = super(type(layer), layer).forward(x).float()
                layer._disable_adapters = True
                without_peft = super(type(layer), layer).forward(x).float()
                layer._disable_adapters = False
                whole = layer(x)
        assert torch.equal(whole.flatten(0, -2), ours.bfloat16())
        assert arrived(term.flatten(0, -2), ours - without) == pytest.approx(1, abs=0.01)
        assert arrived(term, with_peft - without_peft) < 0.5


@torch.no_grad()
def test_the_reference_equals_the_model_with_a_new_adapter_for_every_layout() -> None:
    """Some processors round a 16-bit product differently for strided rows: both sides must use one product."""
    live, _ = adapted()
    for _, layer in lora_layers(live):
        width = layer.lora_A["default"].weight.shape[1]
        for x in (random_rows(width, 0), 50 * random_rows(9 * width, 1).view(2, 9, width, 9)[..., 0]):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                enabled = layer(x)
                layer._disable_adapters = True
                disabled = layer(x)
                layer._disable_adapters = False
            assert torch.equal(enabled, disabled)


def random_rows(width: int, seed: int) -> Tensor:
    """Return [2, 9, width] random numbers that bfloat16 can represent."""
    return torch.randn(2, 9, width, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def test_a_small_step_reaches_modules_as_it_reaches_the_trainer() -> None:
    """The engines that call modules compute the adapter as the trainer does, to the bit."""
    live, copy = adapted()
    batch = probe_batch(40)

    @torch.no_grad()
    def logprobs(model: PreTrainedModel) -> Tensor:
        copy.refresh()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return LogprobModel(model, uses_packed_attention=True, temperature=1.0, uses_kernels=False)(batch)[0]

    for size in (0.0, STEP, 100 * STEP):
        take_step(live, size)
        assert torch.equal(logprobs(live), logprobs(copy.model))
    merged = WorkingCopy(tiny_model(spread=2.0, hidden_size=64), WeightReader())
    merged.bind(live, torch.device("cpu"), compute_dtype=torch.bfloat16)
    merged.refresh()
    assert not torch.equal(logprobs(live), logprobs(merged.model))  # so the comparison above can fail


@pytest.mark.parametrize("name", ["qkv", "out", "gate_up", "down"])
def test_products_of_a_gpu_keep_a_small_adapter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of 16-bit CUDA, on a CPU: rounded by 2^-9 are the adapter's numbers, not its sum with the weight."""
    monkeypatch.setenv("GRPO_KERNELS", "auto,-onednn")
    monkeypatch.setattr(decode, "decoding_dtype", lambda model, dtype: dtype)
    live, copy = adapted("qwen3")
    take_step(live, STEP)
    described = describe(copy.model)
    assert described is not None
    decoder, layer = FusedDecoder(), described.layers[0]
    decoder.dtype, decoder.keeps_adapters = torch.bfloat16, True
    working = WorkingLayer()
    working.refresh(layer, decoder)
    states = torch.randn(5, working.tensors[name].shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    with_adapter = decoder.linear(states, working.tensors, name)
    decoder.keeps_adapters = False
    wide = states.float() @ working.tensors[name].float().T
    if f"{name}_bias" in working.tensors:
        wide += working.tensors[f"{name}_bias"]
    found = (with_adapter - wide).double()
    parts = {
        "qkv": (layer.query, layer.key, layer.value),
        "out": (layer.out,),
        "gate_up": (layer.gate, layer.up),
        "down": (layer.down,),
    }[name]
    expected = []
    for part in parts:
        assert part.adapter is not None
        delta = part.adapter.scale * (part.adapter.b.double() @ part.adapter.a.double())
        rows = states.double() @ delta.T
        if name == "qkv" and part is not layer.value:  # rotated dimensions lie side by side
            rows = rows.unflatten(1, (-1, 2, layer.head_size // 2)).transpose(2, 3).flatten(1)
        expected.append(rows)
    assert float((found - torch.cat(expected, 1)).norm()) <= 0.02 * float(torch.cat(expected, 1).norm())


def test_frozen_weights_are_copied_once() -> None:
    live, copy = adapted()
    assert copy.keeps_adapter and not any("lora_" in name for name in copy.own)  # the adapter itself is shared
    copy.own["model.layers.0.self_attn.q_proj.weight"].data.zero_()
    copy.refresh()
    assert float(copy.own["model.layers.0.self_attn.q_proj.weight"].abs().max()) == 0
    separate = WorkingCopy(tiny_model(spread=2.0, hidden_size=64), WeightReader())
    add_adapter(separate.model, LORA, base="")
    separate.bind(live, torch.device("cpu"), compute_dtype=torch.bfloat16, separate=True)
    take_step(live, 1.0)
    name = "model.layers.0.self_attn.q_proj.lora_B.default.weight"
    separate.refresh()
    assert float(separate.own[name].abs().max()) == 1.0
    take_step(live, 2.0)
    assert float(separate.own[name].abs().max()) == 1.0
    separate.refresh()
    assert float(separate.own[name].abs().max()) == 2.0


def test_an_engine_that_merges_says_so() -> None:
    vllm = merged_adapter_line(RolloutConfig(engine="vllm"))
    assert "adapter merged in" in vllm and "correction truncate weights tokens" in vllm
    assert "truncate corrects it" in merged_adapter_line(RolloutConfig(engine="vllm", correction="none"))
