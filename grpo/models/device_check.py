"""Check of the model on the device and in the precision of the run: packed against its own attention.

`use_grpo_attention` has compared them where the model was loaded: on a CPU, without autocast. What a GPU computes is
other code.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from grpo.errors import NumericsError
from grpo.kernels.attention import NAME
from grpo.kernels.registry import is_on, switch_off
from grpo.models.architecture import own_attention, vocabulary_size
from grpo.models.logprob_model import LogprobModel, is_isolated, probe_batch
from grpo.runtime.precision import Precision

KERNEL = "varlen_attention"
GRADIENT_FACTOR = 5
"""Multiple of `Precision.hidden` that is allowed for the gradient, in which the rounding of all layers adds up."""

Autocast = Callable[[], contextlib.AbstractContextManager[None]]


def check_on_device(model: LogprobModel, autocast: Autocast, precision: Precision, device: torch.device) -> None:
    """Compare logprobs and one gradient of packed and padded rows, and check that groups are isolated.

    If they differ, the kernel of packed attention is switched off, with one line in the log.

    Args:
        model: the policy's, without wrapper. Its weights are whole.
        autocast: returns the context of mixed precision.
        precision: tolerances.
        device: the device of the run.

    Raises:
        NumericsError: they differ without the kernel as well.
    """
    reason = difference(model, autocast, precision, device)
    if reason is not None and is_on(KERNEL):
        switch_off(KERNEL, reason)
        reason = difference(model, autocast, precision, device)
    if reason is not None:
        raise NumericsError(
            f"model.attn_implementation is {NAME}, but on this device {reason}: set model.attn_implementation to sdpa "
            f"and rollout.engine to transformers, and report it with the output of grpo doctor"
        )


def difference(model: LogprobModel, autocast: Autocast, precision: Precision, device: torch.device) -> str | None:
    """Return how packed rows differ from padded ones with the model's own attention; None if only by rounding."""
    causal_lm = model.model
    batch = probe_batch(vocabulary_size(causal_lm)).to(device)
    weight = _sample_weight(causal_lm)
    results: list[tuple[Tensor, Tensor]] = []
    for packed in (True, False):
        causal_lm.set_attn_implementation(NAME if packed else own_attention(causal_lm))
        probe = LogprobModel(causal_lm, uses_packed_attention=packed, temperature=1.0, uses_kernels=packed)
        with torch.enable_grad():
            with autocast():
                logprobs = probe(batch)[0]
            [gradient] = torch.autograd.grad(logprobs.sum(), [weight])
        results.append((logprobs.detach().float(), gradient.float()))
    causal_lm.set_attn_implementation(NAME)
    with autocast():
        isolated = is_isolated(causal_lm, batch)
    (packed_N, packed_gradient), (padded_N, padded_gradient) = results
    distance = float((packed_N - padded_N).abs().mean())
    if not distance <= precision.logprob:
        explained = f"rounding explains {precision.logprob:g}"
        return f"its logprobs differ from those of padded rows by {distance:.2g} ({explained})"
    allowed = GRADIENT_FACTOR * precision.hidden
    distance = float((packed_gradient - padded_gradient).norm() / padded_gradient.norm().clamp(min=1e-30))
    if not distance <= allowed:
        return f"its gradient differs from that of padded rows by {distance:.2g} (rounding explains {allowed:g})"
    return None if isolated else "tokens of one group change the logprobs of another"


def _sample_weight(model: nn.Module) -> nn.Parameter:
    """Return the smallest trained matrix of the first layer that has one. LoRA's A has no gradient at the start."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and ".lora_A." not in name]
    layers = [(name, p) for name, p in trained if p.ndim > 1 and ".layers.0." in name]
    return min((p for _, p in layers or trained), key=torch.Tensor.numel)
