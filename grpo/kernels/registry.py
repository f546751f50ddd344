"""Kernels by name, and the switch GRPO_KERNELS.

    GRPO_KERNELS=auto            every kernel that this machine can run (the default)
    GRPO_KERNELS=torch           none of them: the reference in torch
    GRPO_KERNELS=auto,-NAME,...  all but these, for measuring what each brings

A kernel that fails to build, to be captured or to agree with the reference is switched off with one line in the log, and the
run goes on with the reference.
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
    "token_logprobs": "cpu, C: softmax, target logprobs and entropy of a chunk of logits in one pass",
    "sampling": "cpu, C: sampling from logits in one pass",
    "decode_step": "cpu, C: a decoding step as one call",
    "fused_ops": "cpu, torch: RMSNorm and SwiGLU with backward passes that keep less memory",
    "onednn": "cpu, torch: products with weights in oneDNN's own layout",
    "fused_decode": "all devices, torch: a decoding step in a few large operations per layer",
    "cuda_graphs": "cuda: decoding steps replayed from captured graphs",
}
"""Name -> backend and purpose."""

_failed: dict[str, str] = {}
"""Kernels that were switched off in this process, and why."""


def is_on(name: str) -> bool:
    """Return whether kernel `name` may be used. Raises ConfigError if GRPO_KERNELS cannot be read."""
    return name in chosen(os.environ.get(VARIABLE, "auto")) and name not in _failed


def check_switch() -> None:
    """Raise ConfigError if GRPO_KERNELS cannot be read."""
    chosen(os.environ.get(VARIABLE, "auto"))


def switch_off(name: str, reason: str) -> None:
    """Use the reference instead of kernel `name` from now on, and say so once."""
    if name not in _failed:
        _failed[name] = reason
        log.info(f"kernel {name} is off: {reason}; using the reference in PyTorch (slower)")


@functools.cache
def chosen(value: str) -> frozenset[str]:
    """Return the names that a value of GRPO_KERNELS allows. Raises ConfigError for anything else than in the table above."""
    base, *without = [part.strip() for part in value.split(",")]
    removed = {part.removeprefix("-") for part in without}
    if base not in ("auto", "torch") or removed - KERNELS.keys() or not all(part.startswith("-") for part in without):
        raise ConfigError(
            f"{VARIABLE} is '{value}', which names no kernels: set it to auto, to torch (the reference alone), or to "
            f"auto,-NAME,... Known: {', '.join(KERNELS)}; the names are explained in grpo/kernels/registry.py"
        )
    return frozenset(KERNELS) - removed if base == "auto" else frozenset()
