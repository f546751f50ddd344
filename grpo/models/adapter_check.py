"""Check of the merge: a policy with a random adapter -> its logprobs, live and merged into plain weights.

Engines sample from merged weights, and `final/` holds them. A layer that ignores its adapter in one of the two would
train one policy and save another.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.errors import ConfigError
from grpo.models.architecture import vocabulary_size
from grpo.models.logprob_model import LogprobModel, probe_batch
from grpo.models.lora import adapted_parameter, delta_weight, lora_layers
from grpo.models.weights import WorkingCopy
from grpo.runtime.precision import PRECISIONS

SPREAD = 0.1
"""Standard deviation of the random numbers that take the place of the zeros that an adapter starts with."""

EXACT = PRECISIONS[torch.float32].logprob
ROUNDED_SHARE = 0.1


@torch.no_grad()
def check_merge(live: nn.Module, plain: LogprobModel, working_copy: WorkingCopy, tolerance: float) -> None:
    """Compare live and merged logprobs with a random adapter, and restore the adapter. Collective.

    The working copy must be refreshed afterwards.

    Args:
        live: the policy's `LogprobModel`, wrapped.
        plain: the same without wrapper.
        working_copy: the merged model.
        tolerance: largest mean difference that rounding explains, in nats.

    Raises:
        ConfigError: they differ.
    """
    model = plain.model
    device = next(working_copy.model.parameters()).device
    batch = probe_batch(vocabulary_size(model)).to(device)
    merged = LogprobModel(
        working_copy.model,
        uses_packed_attention=plain.uses_packed_attention,
        temperature=plain.temperature,
        uses_kernels=False,
    )
    before = live(batch)[0]
    with _random_adapter(model):
        working_copy.refresh()
        after = live(batch)[0]
        with _merged(working_copy.model):
            difference = float((after - merged(batch)[0]).abs().mean())
    if tolerance > EXACT:  # 16-bit weights are rounded after the merge, by a share of what the adapter adds
        tolerance = max(tolerance, ROUNDED_SHARE * float((after - before).abs().mean()))
    if not difference <= tolerance:
        ends = sorted({name.split(".")[-1] for name, _ in lora_layers(model)})
        raise ConfigError(
            f"lora.target_modules takes in {', '.join(ends)}, but merged into the weights the adapter gives logprobs "
            f"that differ from those with the adapter beside them by {difference:.2g} on average (rounding explains "
            f"{tolerance:g}): {type(model).__name__} reads the weights of one of these layers directly. Name fewer "
            f"layers, for example q_proj, k_proj, v_proj, o_proj"
        )


@contextlib.contextmanager
def _merged(model: PreTrainedModel) -> Iterator[None]:
    """Merge the adapter of a working copy that keeps it beside its weights (in 16 bits) within, as a save does."""
    kept: list[tuple[nn.Parameter, Tensor]] = []
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        parameter = adapted_parameter(layer)
        kept.append((parameter, parameter.data))
        parameter.data = parameter.data + delta_weight(layer).to(parameter.dtype)
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        for parameter, before in reversed(kept):
            parameter.data = before


@contextlib.contextmanager
def _random_adapter(model: PreTrainedModel) -> Iterator[None]:
    """Replace the second matrices of the adapter, which start at 0, by random numbers within."""
    kept: list[tuple[Tensor, Tensor]] = []
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or ".lora_embedding_B." in name:
            own = parameter.to_local() if hasattr(parameter, "to_local") else parameter.data  # this process's shard
            kept.append((own, own.clone()))
            own.copy_(SPREAD * torch.randn(own.shape, generator=generator))
    try:
        yield
    finally:
        for own, before in kept:
            own.copy_(before)
