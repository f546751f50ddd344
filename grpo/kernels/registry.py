"""Kernels by name, and the switch GRPO_KERNELS.

    GRPO_KERNELS=auto            every kernel that this machine can run (the default)
    GRPO_KERNELS=torch           none of them: the reference in PyTorch
    GRPO_KERNELS=auto,-NAME,...  all but those named, to measure the effect of each

A kernel that fails or differs from the reference at the start of a run, or whose CUDA graph cannot be captured, is
switched off with one line in the log. The run continues with the reference.
"""

import functools
import logging
import os

from grpo.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE = "GRPO_KERNELS"
KERNELS = {
    "decoder_layer": "cpu, C: a decoder layer of training as one autograd function",
    "attention": "cpu, C: attention of packed groups, forward and backward",
    "sampling": "cpu, C: sampling from logits in one pass",
    "decode_step": "cpu, C: a decoding step as one call",
    "fused_ops": "cpu, torch: RMSNorm and SwiGLU with backward passes that keep less memory",
    "onednn": "cpu, torch: products with weights in oneDNN's own layout",
    "fused_decode": "all devices, torch: a decoding step in a few large operations per layer",
    "varlen_attention": "cuda, torch: attention of packed groups in one call per layer, in 16 bits",
    "fused_norm": "cuda, torch: RMSNorm of a module in one launch",
    "narrow_head": "cuda, torch: products of the output head in the dtype of autocast, with float32 sums",
    "cuda_graphs": "cuda: decoding steps replayed from captured graphs",
}
"""Name -> device, implementation and purpose."""

_failed: dict[str, str] = {}
"""Name -> reason, of the kernels that were switched off in this process."""


def is_on(name: str) -> bool:
    """Return whether kernel `name` may be used.

    Raises:
        ConfigError: GRPO_KERNELS is invalid.
    """
    return name in chosen(os.environ.get(VARIABLE, "auto")) and name not in _failed


def check_switch() -> None:
    """Raise ConfigError if GRPO_KERNELS is invalid."""
    chosen(os.environ.get(VARIABLE, "auto"))


def switch_off(name: str, reason: str) -> None:
    """Use the reference instead of kernel `name` from now on. The reason is logged once per kernel."""
    if name not in _failed:
        _failed[name] = reason
        log.info(f"kernel {name} is off: {reason}; using the reference in PyTorch (slower)")


def report(device: str) -> str:
    """Return which kernels are on for a kind of device, and which are off and why, in one line."""
    mine = [name for name, text in KERNELS.items() if text.startswith((device, "all"))]
    on = [name for name in mine if is_on(name)]
    off = [f"{name} ({_failed.get(name, VARIABLE)})" for name in mine if name not in on]
    return f"kernels: {', '.join(on) or 'none'}" + (f"; off: {', '.join(off)}" if off else "")


@functools.cache
def chosen(value: str) -> frozenset[str]:
    """Return the names of the kernels that `value`, a value of GRPO_KERNELS, allows.

    Raises:
        ConfigError: it has another form, or names an unknown kernel.
    """
    base, *without = [part.strip() for part in value.split(",")]
    removed = {part.removeprefix("-") for part in without}
    if base not in ("auto", "torch") or removed - KERNELS.keys() or not all(part.startswith("-") for part in without):
        raise ConfigError(
            f"{VARIABLE} is '{value}', which names no kernels: set it to auto, to torch (the reference alone), or to "
            f"auto,-NAME,... Known: {', '.join(KERNELS)}; the names are explained in grpo/kernels/registry.py"
        )
    return frozenset(KERNELS) - removed if base == "auto" else frozenset()
