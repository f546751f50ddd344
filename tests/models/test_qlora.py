"""QLoRA: a 4-bit base under a float32 adapter, on the CPU that bitsandbytes also knows."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grpo.config.schema import LoraConfig, ModelConfig
from grpo.models.loading import load_model
from grpo.models.logprob_model import LogprobModel, probe_batch, use_grpo_attention
from grpo.models.lora import add_adapter, delta_weight, lora_layers
from grpo.models.weights import WeightReader, WorkingCopy
from grpo.rollout.backbones import ModuleBackbone, choose_backbone
from tests.fakes import tiny_folder
from tests.models.test_lora import learn, lora_policy, lora_run
from tests.models.test_lora_16bit import STEP, arrived, sampled_logprobs, take_step

pytest.importorskip("bitsandbytes", reason='pip install -e ".[qlora]"')
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
"""Blocks of 4-bit weights have 64 numbers."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model", **WIDE)


def test_the_base_stays_in_4_bits_and_what_is_sampled_is_what_learns(folder: Path) -> None:
    policy, batch = lora_policy(folder, load_in_4bit=True), probe_batch(42)
    policy.check()
    bases = {name: layer.base_layer.weight for name, layer in lora_layers(policy.model)}
    assert {weight.data.dtype for weight in bases.values()} == {torch.uint8}
    before = {name: weight.data.clone() for name, weight in bases.items()}
    with torch.no_grad():
        start = policy.logprobs(batch)[0]
    learn(policy)
    with torch.no_grad():
        after = policy.logprobs(batch)[0]
        sampled = LogprobModel(policy.sampler, uses_packed_attention=True, temperature=1.0)(batch)[0]
        reference = policy.reference_logprobs([batch])[0]
    assert all(torch.equal(before[name], bases[name].data) for name in bases)
    assert (after - start).abs().max() > 0.01
    assert reference is not None and torch.equal(reference, start)
    assert torch.allclose(sampled, after, atol=2e-5)


def test_a_layer_by_hand(folder: Path) -> None:
    """Sampling uses the dequantized base plus B A times alpha / r; 4 bits change weights by a few per cent."""
    from bitsandbytes.functional import dequantize_4bit

    policy = lora_policy(folder, ["q_proj"], load_in_4bit=True)
    learn(policy)
    layer = next(layer for name, layer in lora_layers(policy.model) if name.endswith("layers.0.self_attn.q_proj"))
    weight = layer.base_layer.weight
    with torch.no_grad():
        expected = dequantize_4bit(weight.data, weight.quant_state) + delta_weight(layer)
    sampled = policy.sampler.get_submodule("model.layers.0.self_attn.q_proj").weight
    assert torch.allclose(sampled, expected.to(sampled.dtype), atol=1e-6)
    exact = load_model(str(folder)).get_submodule("model.layers.0.self_attn.q_proj").weight.detach()
    error = (dequantize_4bit(weight.data, weight.quant_state) - exact).norm() / exact.norm()
    assert 0.01 < float(error) < 0.15


@pytest.mark.parametrize("engine", ["native", "modules"])
def test_a_small_step_on_a_4_bit_base_reaches_the_sampler(folder: Path, engine: str) -> None:
    """In bfloat16. The modules' sum is exact before it is rounded (test_lora_16bit.py): theirs is a larger step."""
    live = load_model(str(folder), ModelConfig(name=str(folder), load_in_4bit=True))
    assert use_grpo_attention(live)
    copy = WorkingCopy(live, WeightReader())
    for model in (live, copy.model):
        add_adapter(model, LoraConfig(r=4, lora_alpha=8), base="")
    copy.model.eval()
    copy.bind(live, torch.device("cpu"), compute_dtype=torch.bfloat16)
    copy.refresh()
    assert copy.keeps_adapter
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backbone = choose_backbone(copy.model)[0] if engine == "native" else ModuleBackbone(copy.model)

    def both() -> tuple[Tensor, Tensor]:
        copy.refresh()
        return sampled_logprobs(ModuleBackbone(live), torch.float32), sampled_logprobs(backbone, torch.bfloat16)

    take_step(live, 0.0)
    before = both()
    take_step(live, STEP if engine == "native" else 3000 * STEP)
    exact, found = (now - was for now, was in zip(both(), before, strict=True))
    assert arrived(exact, found) == pytest.approx(1, abs=0.01 if engine == "native" else 0.1)


def test_a_run_is_resumed_to_the_bit_and_saved_whole(tmp_path: Path, folder: Path) -> None:
    in_4_bits = {"model.load_in_4bit": "true"}
    whole = lora_run(tmp_path, folder, "whole", 2, **in_4_bits)
    lora_run(tmp_path, folder, "part", 1, **in_4_bits)
    resumed = lora_run(tmp_path, folder, "part", 2, resume="auto", **in_4_bits)
    assert whole.keys() == resumed.keys() and all("lora_" in name for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "final" / "config.json").read_text())
    merged = load_model(str(tmp_path / "whole" / "final"))  # a plain folder again
    assert all(parameter.dtype == torch.float32 for parameter in merged.parameters())
