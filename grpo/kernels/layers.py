"""Training's way through a described model: token ids of one packed row -> last hidden states.

Each layer goes through the fastest path that takes it: one autograd function of grpo/kernels/cpu, or else its parts one by one, with
the packed attention of grpo/kernels/attention.py. The modules of the model are not called.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from grpo.kernels.attention import PackedLayout, packed_attention
from grpo.kernels.cpu import fused_layer
from grpo.kernels.cpu.fused_ops import rms_norm, rotate, swiglu
from grpo.kernels.description import Layer, Linear, Model
from grpo.kernels.gradients import gradient_buffer
from grpo.kernels.registry import is_on


def is_supported(model: Model) -> bool:
    """Return whether `hidden_states` is the way for this model: on a CPU, where calls and passes over memory are what costs."""
    return model.embedding.is_cpu and is_on("fused_ops")


def hidden_states(
    model: Model,
    ids_T: Tensor,
    positions_T: Tensor,
    layout: PackedLayout,
    *,
    accumulate_grads_inplace: bool = False,
) -> Tensor:
    """Last hidden states of one packed row.

    Args:
        model: its description.
        ids_T: [T] token ids.
        positions_T: [T] positions for the rotary embedding.
        layout: which tokens see which.
        accumulate_grads_inplace: the backward pass may add gradients to .grad of the weights by itself, instead of making each of
            them, as large as its weight, for autograd to add and drop. Only for weights of this process alone: what exchanges
            gradients (DDP, FSDP) waits for autograd.

    Returns:
        [T, hidden_size]
    """
    hidden: Tensor = Lookup.apply(ids_T, model.embedding, model.padding_id, accumulate_grads_inplace)
    cos, sin = (part[0] for part in model.rotary(hidden[None], positions_T[None]))
    for layer in model.layers:
        arguments = (layer, hidden, cos, sin, layout, accumulate_grads_inplace)
        if model.checkpointed:
            hidden = checkpoint(decoder_layer, *arguments, use_reentrant=False)
        else:
            hidden = decoder_layer(*arguments)
    return rms_norm(hidden, model.norm, model.epsilon)


def decoder_layer(
    layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout, accumulate_grads_inplace: bool
) -> Tensor:
    """[T, hidden_size] -> [T, hidden_size]"""
    if fused_layer.is_supported(layer, hidden, cos, sin):
        return fused_layer.fused_layer(
            layer, hidden, cos, sin, layout, accumulate_grads_inplace=accumulate_grads_inplace
        )
    return composed_layer(layer, hidden, cos, sin, layout)


def composed_layer(layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout) -> Tensor:
    """A layer part by part: in every dtype, with and without C."""
    normed = rms_norm(hidden, layer.norm, layer.epsilon)
    query, key, value = (
        linear(normed, part).unflatten(-1, (-1, layer.head_size)) for part in (layer.query, layer.key, layer.value)
    )
    if layer.query_norm is not None and layer.key_norm is not None:
        query = rms_norm(query, layer.query_norm, layer.head_epsilon)
        key = rms_norm(key, layer.key_norm, layer.head_epsilon)
    if layer.rotary:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    attended = packed_attention(query, key, value, layout, layer.scaling, layer.window)
    middle = hidden + linear(attended[0].transpose(0, 1).flatten(1), layer.out)
    normed = rms_norm(middle, layer.mlp_norm, layer.mlp_epsilon)
    return middle + linear(swiglu(linear(normed, layer.gate), linear(normed, layer.up)), layer.down)


def linear(states: Tensor, part: Linear) -> Tensor:
    """[T, inputs] -> [T, outputs], with the adapter's share as peft computes it."""
    result = F.linear(states, part.weight, part.bias)
    if part.adapter is None:
        return result
    low = F.linear(states.to(part.adapter.a.dtype), part.adapter.a)
    return (result + F.linear(low, part.adapter.b) * part.adapter.scale).to(result.dtype)


class Lookup(torch.autograd.Function):
    """ids [T] and weight [V, H] -> [T, H]. The ids are often few beside the vocabulary: in place, only their rows of the gradient
    are touched."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, ids: Tensor, weight: Tensor, padding: int | None, accumulate_grads_inplace: bool
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding, ctx.in_place = weight, padding, accumulate_grads_inplace
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None, None
        [ids] = ctx.saved_tensors
        buffer = gradient_buffer(ctx.weight, ctx.in_place)
        made = torch.zeros_like(ctx.weight) if buffer is None else buffer
        if ctx.padding is not None:
            gradient = gradient * (ids != ctx.padding)[:, None]
        made.index_add_(0, ids, gradient.to(made.dtype))
        return None, made if buffer is None else None, None, None
