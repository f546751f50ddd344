"""The check of the model on its device: it passes, a wrong kernel is switched off, a wrong model ends the run."""

import contextlib
import logging
from dataclasses import replace

import pytest
import torch

from grpo.config.schema import LoraConfig
from grpo.errors import NumericsError
from grpo.kernels import registry
from grpo.kernels.attention import PackedLayout
from grpo.kernels.cuda import varlen
from grpo.models.device_check import KERNEL, check_on_device
from grpo.models.logprob_model import LogprobModel, use_grpo_attention
from grpo.models.lora import add_adapter
from grpo.runtime.precision import PRECISIONS
from tests.fakes import tiny_model, use_slow_varlen


@pytest.fixture(autouse=True)
def nothing_failed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(registry, "_failed", {})
    return registry._failed


def check(model: LogprobModel, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    def autocast() -> contextlib.AbstractContextManager[None]:
        return torch.autocast(device, dtype=None if dtype == torch.float32 else dtype, enabled=dtype != torch.float32)

    check_on_device(model, autocast, PRECISIONS[dtype], torch.device(device))


def model_of(family: str = "qwen2") -> LogprobModel:
    return LogprobModel(tiny_model(family), uses_packed_attention=True, temperature=1.0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_model_passes(family: str, dtype: torch.dtype, nothing_failed: dict[str, str]) -> None:
    model = model_of(family)
    check(model, dtype)
    assert not nothing_failed and model.model.config._attn_implementation == "grpo"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_adapter_has_a_gradient_to_compare(nothing_failed: dict[str, str]) -> None:
    model = model_of()
    add_adapter(model.model, LoraConfig(r=4), base="")
    check(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is None for parameter in trained)
    assert not nothing_failed


def test_a_wrong_kernel_is_switched_off(
    nothing_failed: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRPO_KERNELS", "auto,-decoder_layer,-attention,-fused_ops")
    use_slow_varlen(monkeypatch)
    monkeypatch.setattr(PackedLayout, "uses_varlen", property(lambda layout: registry.is_on(KERNEL)))
    model = model_of()
    check(model)
    assert not nothing_failed  # the stand-in is right
    of = varlen.VarlenPlan.of
    monkeypatch.setattr(varlen.VarlenPlan, "of", lambda *given: replace(of(*given), keys_R=of(*given).keys_R.flip(0)))
    with caplog.at_level(logging.INFO, logger="grpo"):
        check(model)
    assert list(nothing_failed) == [KERNEL]
    assert "kernel varlen_attention is off: its logprobs differ from those of padded rows by" in caplog.text


def test_a_wrong_model_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward = model_of(), LogprobModel.forward

    def off(self: LogprobModel, batch: object) -> object:
        logprobs, entropies = forward(self, batch)  # type: ignore[arg-type]
        return logprobs - 0.01 * self.uses_packed_attention, entropies

    monkeypatch.setattr(LogprobModel, "forward", off)
    with pytest.raises(NumericsError, match="its logprobs differ from those of padded rows by 0.01 .*grpo doctor"):
        check(model)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3"])
def test_models_pass_on_a_gpu(family: str, dtype: torch.dtype, nothing_failed: dict[str, str]) -> None:
    model = tiny_model(family).to("cuda")
    assert use_grpo_attention(model)
    check(LogprobModel(model, uses_packed_attention=True, temperature=1.0), dtype, "cuda")
    assert not nothing_failed
