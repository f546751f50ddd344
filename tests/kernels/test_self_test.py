"""The self-test at the start: correct kernels stay enabled, wrong or unused ones are disabled, the run continues."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from grpo.errors import ConfigError
from grpo.kernels import head, layers, registry, self_test
from grpo.kernels.cpu import ops
from grpo.kernels.cpu.compiler import library
from grpo.kernels.registry import KERNELS, chosen, is_on
from grpo.models.families import FAMILIES
from grpo.models.logprob_model import run_self_test
from tests.fakes import tiny_model

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
    assert ops.calls["softmax"] and ops.calls["draw"]
    assert autocast is not None or ops.calls["attention_backward"]


@needs_a_compiler
def test_wrong_kernels_are_switched_off(
    nothing_failed: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer, softmax, draw = layers.decoder_layer, head.softmax, self_test.draw_tokens

    def backward_off(*arguments: object) -> Tensor:
        """Return correct values, and gradients that are 0.1 % too large."""
        made = layer(*arguments)  # type: ignore[arg-type]
        if made.requires_grad:
            made.register_hook(lambda gradient: gradient * 1.001)
        return made

    monkeypatch.setattr(layers, "decoder_layer", backward_off)
    monkeypatch.setattr(head, "softmax", lambda logits, *rest: softmax(logits + torch.arange(logits.shape[1]), *rest))
    monkeypatch.setattr(self_test, "draw_tokens", lambda *given: (draw(*given)[0].roll(1), draw(*given)[1]))
    with caplog.at_level(logging.INFO, logger="grpo"):
        run_self_test(tiny_model(), None)
    assert nothing_failed.keys() == {"decoder_layer", "attention", "token_logprobs", "sampling"}
    assert not is_on("sampling") and is_on("onednn")
    assert "kernel sampling is off: the self-test differs from the reference by" in caplog.text


@needs_a_compiler
def test_a_kernel_that_is_not_called_is_no_kernel(
    nothing_failed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "c_kernel", lambda *_: False)
    run_self_test(tiny_model(), None)
    assert nothing_failed == {"token_logprobs": "the self-test did not reach it"}


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


def test_a_capture_that_fails_leaves_the_step(monkeypatch: pytest.MonkeyPatch, nothing_failed: dict[str, str]) -> None:
    from grpo.kernels.cuda import graphs

    def fails(step: object) -> None:
        state.value.add_(5)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    state = SimpleNamespace(value=torch.zeros(1))
    monkeypatch.setattr(graphs, "_captured", fails)
    graphs.StepGraphs().run("key", lambda: state.value.add_(1), [state.value])
    assert state.value.item() == 1
    assert nothing_failed == {
        "cuda_graphs": "capture failed (operation not permitted when stream is capturing)",
    }
