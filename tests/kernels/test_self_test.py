"""The self-test at the start: correct kernels stay enabled, wrong or unused ones are disabled, the run continues."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.config.schema import LoraConfig
from grpo.errors import ConfigError
from grpo.kernels import layers, registry, sampling, self_test
from grpo.kernels.cpu import ops
from grpo.kernels.cpu.compiler import library
from grpo.kernels.cuda import norms, varlen
from grpo.kernels.description import Layer
from grpo.kernels.registry import KERNELS, chosen, is_on
from grpo.models.families import FAMILIES
from grpo.models.logprob_model import run_self_test
from grpo.models.lora import add_adapter
from tests.fakes import tiny_model, use_slow_varlen

needs_a_compiler = pytest.mark.skipif(library() is None, reason="there is no C compiler here")


@pytest.fixture(autouse=True)
def nothing_failed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(registry, "_failed", {})
    return registry._failed


@needs_a_compiler
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_right_kernels_stay_on(nothing_failed: dict[str, str], family: str, autocast: torch.dtype | None) -> None:
    ops.calls.clear()
    run_self_test(tiny_model(family), autocast)
    assert not nothing_failed
    assert ops.calls["draw"]
    assert autocast is not None or ops.calls["attention_backward"]


@needs_a_compiler
def test_wrong_kernels_are_switched_off(
    nothing_failed: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer, draw = layers.decoder_layer, self_test.draw_tokens

    def backward_off(*arguments: object) -> Tensor:
        """Return correct values, and gradients that are 0.1 % too large."""
        made = layer(*arguments)  # type: ignore[arg-type]
        if made.requires_grad:
            made.register_hook(lambda gradient: gradient * 1.001)
        return made

    monkeypatch.setattr(layers, "decoder_layer", backward_off)
    monkeypatch.setattr(self_test, "draw_tokens", lambda *given: (draw(*given)[0].roll(1), draw(*given)[1]))
    with caplog.at_level(logging.INFO, logger="grpo"):
        run_self_test(tiny_model(), None)
    assert nothing_failed.keys() == {"decoder_layer", "attention", "sampling"}
    assert not is_on("sampling") and is_on("onednn")
    assert "kernel sampling is off: the self-test differs from the reference by" in caplog.text


@needs_a_compiler
@pytest.mark.parametrize("wrong", ["adapter", "window"])
def test_every_kind_of_layer_is_checked(
    nothing_failed: dict[str, str], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """A layer that is wrong with an adapter, or with the window that only the last layer has."""
    compute = layers.decoder_layer
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    if wrong == "adapter":
        model = tiny_model("qwen2")
        add_adapter(model, LoraConfig(r=4, target_modules=["v_proj"]), base="")
    run_self_test(model, None)
    assert not nothing_failed

    def without(layer: Layer, *rest: object) -> Tensor:
        value = replace(layer.value, adapter=None)
        return compute(replace(layer, value=value, window=None), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "decoder_layer", without)
    run_self_test(model, None)
    assert "decoder_layer" in nothing_failed


@needs_a_compiler
def test_a_kernel_that_is_not_called_is_no_kernel(
    nothing_failed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "c_kernel", lambda *_: False)
    run_self_test(tiny_model(), None)
    assert nothing_failed == {"sampling": "the self-test did not reach it"}


def test_without_a_compiler_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nothing_failed: dict[str, str]
) -> None:
    monkeypatch.setattr(self_test, "library", lambda: None)
    monkeypatch.setenv("CC", "none")
    with caplog.at_level(logging.INFO, logger="grpo"):
        run_self_test(tiny_model(), None)
    assert caplog.messages == ["CPU kernels could not be compiled with 'none'; using PyTorch (slower)"]
    assert not nothing_failed


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("auto") == set(KERNELS) and chosen("torch") == set()
    assert chosen("auto, -gemm".replace("gemm", "onednn")) == set(KERNELS) - {"onednn"}
    for wrong in ("", "all", "auto,onednn", "auto,-no_such", "torch,-"):
        with pytest.raises(ConfigError, match="GRPO_KERNELS is .*decoder_layer, attention"):
            chosen(wrong)
    monkeypatch.setenv("GRPO_KERNELS", "auto,-sampling")
    assert is_on("attention") and not is_on("sampling")


@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 3, 8)], ids=str)
def test_checks_of_a_gpu_on_this_processor(heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct attention and heads pass, also with the stand-in for the kernel of CUDA. Wrong ones do not."""
    cpu = torch.device("cpu")
    assert self_test.attention_error(heads, cpu, torch.float32) < 1e-5
    assert self_test.attention_leak(heads, cpu, torch.float32) == 0
    assert self_test.head_error(300, cpu, torch.float32) < 1e-5
    assert 0 < self_test.attention_error(heads, cpu, torch.bfloat16) < 4e-2
    assert self_test.norm_error(96, cpu, torch.float32) < 1e-5
    assert self_test.norm_error(96, cpu, torch.bfloat16) < 1e-2
    use_slow_varlen(monkeypatch)
    assert self_test.attention_error(heads, cpu, torch.float32) < 1e-5
    assert self_test.attention_leak(heads, cpu, torch.float32) == 0
    of = varlen.VarlenPlan.of
    monkeypatch.setattr(varlen.VarlenPlan, "of", lambda *given: replace(of(*given), keys_R=of(*given).keys_R.flip(0)))
    assert self_test.attention_error(heads, cpu, torch.float32) > 4e-2
    assert self_test.attention_leak(heads, cpu, torch.float32) > 0
    monkeypatch.setattr(
        norms, "rms_norm", lambda hidden, weight, epsilon: F.rms_norm(hidden, weight.shape, weight, 0.1)
    )
    assert self_test.norm_error(96, cpu, torch.float32) > 1e-2


def test_an_error_of_the_device_or_its_memory_is_no_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: device-side assert triggered"),
    ):

        def check(error: RuntimeError = error) -> float:
            raise error

        with pytest.raises(RuntimeError):
            self_test._judge("sampling", check, 1e-4)
    assert is_on("sampling")


def test_a_gpu_that_is_too_old_for_a_kernel_is_named(
    nothing_failed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_KERNELS", "auto,-fused_norm")  # its check needs a GPU
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    self_test.run(None, torch.device("cuda", 0), 100)
    assert nothing_failed == {"varlen_attention": "it needs compute capability 8.0, and this GPU has 7.5"}
    nothing_failed.clear()
    capability = (8, 0)
    self_test.run(None, torch.device("cuda", 0), 100)
    assert not nothing_failed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_checks_pass_on_a_gpu(nothing_failed: dict[str, str], dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    self_test.run(None, device, 50_000, dtype, 4e-2, (8, 2, 64))
    assert not nothing_failed
    assert self_test.attention_error((8, 2, 64), device, torch.float32) < 1e-4
    assert self_test.attention_leak((8, 2, 64), device, torch.float32) == 0


def test_the_report_names_what_is_off_and_why(nothing_failed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    registry.switch_off("cuda_graphs", "of this test")
    assert (
        registry.report("cuda")
        == "kernels: fused_decode, varlen_attention, fused_norm, narrow_head; off: cuda_graphs (of this test)"
    )
    monkeypatch.setenv("GRPO_KERNELS", "auto,-narrow_head")
    assert "narrow_head (GRPO_KERNELS)" in registry.report("cuda")
