"""Layers of training, from a model's description: token ids of one packed row -> last hidden states.

A layer runs as one autograd function (grpo/kernels/cpu/fused_layer.py) if that function supports it. Otherwise it runs
operation by operation, with the packed attention of grpo/kernels/attention.py. The model's modules are not called.
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
    """Return whether `hidden_states` should compute this model: on a CPU, with kernel `fused_ops` switched on.

    On a CPU, calls and passes over memory take a large part of the time. On other devices the modules run.
    """
    return model.embedding.is_cpu and is_on("fused_ops")


def hidden_states(
    model: Model,
    ids_T: Tensor,
    positions_T: Tensor,
    layout: PackedLayout,
    *,
    accumulate_grads_inplace: bool = False,
) -> Tensor:
    """Return the last hidden states of one packed row.

    Args:
        model: description of the model.
        ids_T: [T] token ids.
        positions_T: [T] positions for the rotary embedding.
        layout: the groups in the row, which determine the tokens that each token attends to.
        accumulate_grads_inplace: the backward pass may add gradients directly to `.grad` of the weights. Otherwise it
            allocates a gradient of the size of each weight, which autograd adds and frees. Only for weights that no
            other process shares: DDP and FSDP exchange gradients through autograd.

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
    """Compute one layer by the fastest path that supports it: [T, hidden_size] -> [T, hidden_size]."""
    if fused_layer.is_supported(layer, hidden, cos, sin):
        return fused_layer.fused_layer(
            layer, hidden, cos, sin, layout, accumulate_grads_inplace=accumulate_grads_inplace
        )
    return composed_layer(layer, hidden, cos, sin, layout)


def composed_layer(layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout) -> Tensor:
    """Compute one layer operation by operation: [T, hidden_size] -> [T, hidden_size].

    Supports every dtype and does not need the C library.
    """
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
    """Linear layer [T, inputs] -> [T, outputs], with the adapter's term in the dtypes that peft uses."""
    result = F.linear(states, part.weight, part.bias)
    if part.adapter is None:
        return result
    low = F.linear(states.to(part.adapter.a.dtype), part.adapter.a)
    return (result + F.linear(low, part.adapter.b) * part.adapter.scale).to(result.dtype)


class Lookup(torch.autograd.Function):
    """Embedding lookup: ids [T] and weight [V, H] -> [T, H].

    T is often small compared with V. If the gradient is added in place, only the rows of these ids are written.
    """

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
