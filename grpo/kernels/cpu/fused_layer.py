"""A decoder layer of training as one autograd function: products by torch, the operations between them in C.

Products run in float32 or, under autocast, in bfloat16 on copies of the weights that are freed after use. Everything
else is float32: the residual stream, norms, rotary embedding, attention, and the gradients that are added to `.grad`.

Kept for the backward pass, per token: the layer's input in float32 and the attended states in the dtype of the
products; in float32 also the joint projections, the residual stream after attention and the gates. Everything else is
recomputed: in bfloat16, products are cheap, and the memory that a layer keeps is a quarter. The products of adapters
(LoRA) are recomputed too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels.attention import PackedLayout
from grpo.kernels.cpu import ops
from grpo.kernels.cpu.attention import attend, attend_backward
from grpo.kernels.cpu.compiler import c_kernel, threads_for
from grpo.kernels.description import Layer, Linear
from grpo.kernels.gradients import gradient_buffer
from grpo.kernels.registry import is_on


def is_supported(layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether `fused_layer` can compute this layer.

    It needs the C library with its attention, float32 weights on a CPU, and biases only for query, key and value.
    """
    weights = [part.weight for part in layer.linears] + [
        part.bias for part in layer.linears[:3] if part.bias is not None
    ]
    return (
        all(part.bias is None for part in layer.linears[3:])
        and layer.head_size % 8 == 0
        and _product_dtype() in (torch.float32, torch.bfloat16)
        and is_on("attention")
        and c_kernel("decoder_layer", hidden, cos, sin, *layer.norms, *weights)
    )


def _product_dtype() -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def fused_layer(
    layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout, *, accumulate_grads_inplace: bool
) -> Tensor:
    """Compute one layer.

    Args:
        layer: description of the layer.
        hidden: [T, hidden_size].
        cos: [T, head_size].
        sin: [T, head_size].
        layout: the groups in the row.
        accumulate_grads_inplace: as for `layers.hidden_states`.

    Returns:
        [T, hidden_size]
    """
    parameters = _parameters(layer)
    outside = layout.outside()
    result: Tensor = FusedLayer.apply(
        hidden, cos, sin, layout, layer, _product_dtype(), accumulate_grads_inplace, *parameters, *outside
    )
    return result


ADAPTERS = 14
"""Place of the first adapter in a layer's parameters: after two norms, seven weights, three biases and the norms of
query and key."""
PARAMETERS = ADAPTERS + 14
"""Both matrices of seven adapters come last."""


def _parameters(layer: Layer) -> tuple[Tensor | None, ...]:
    linears, biases = layer.linears, (part.bias for part in layer.linears[:3])
    adapters = [part.adapter for part in linears]
    pairs = [(None, None) if adapter is None else (adapter.a, adapter.b) for adapter in adapters]
    weights = (part.weight for part in linears)
    norms = (layer.query_norm, layer.key_norm)
    return (layer.norm, layer.mlp_norm, *weights, *biases, *norms, *(tensor for pair in pairs for tensor in pair))


class FusedLayer(torch.autograd.Function):
    """Autograd function of one layer: hidden [T, hidden_size] -> [T, hidden_size].

    `tensors` are the layer's parameters, then the keys and values, in turn, of the prompts outside the row, [1, K, P,
    D] each.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: PackedLayout,
        layer: Layer,
        dtype: torch.dtype,
        accumulate_grads_inplace: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        prompts = [prompt.transpose(1, 2).contiguous() for prompt in tensors[PARAMETERS:] if prompt is not None]
        weights = [part.weight for part in layer.linears]
        with torch.autocast("cpu", enabled=False):
            mixed, _, _ = _projected(layer, hidden, weights, dtype)
            query, key, value, _ = _split(layer, mixed, cos, sin)
            joins = layout.watch(*(part.transpose(0, 1)[None] for part in (key, value))) if layout.watched else []
            sequences = layout.sequences
            attended, lse = attend(query, key, value, prompts, sequences, layer.scaling, layer.window)
            attended = attended.flatten(1).to(dtype)
            middle = _plus_product(hidden, attended, layer.out)
            gates_ups, _, _ = _gates(layer, middle, weights, dtype)
            result = _plus_product(middle, _gated(gates_ups), layer.down)
        ctx.recomputes = dtype != torch.float32
        kept = () if ctx.recomputes else (mixed, middle, gates_ups)
        ctx.save_for_backward(hidden, cos, sin, attended, lse, *weights, *kept, *prompts)
        ctx.layer, ctx.dtype, ctx.in_place = layer, dtype, accumulate_grads_inplace
        ctx.sequences, ctx.joins = sequences, joins
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, cos, sin, attended, lse, *others = ctx.saved_tensors
        weights, prompts = others[:7], others[7 if ctx.recomputes else 10 :]
        mixed, middle, gates_ups = (None, None, None) if ctx.recomputes else others[7:10]
        layer, dtype = ctx.layer, ctx.dtype
        to = _Gradients(layer, ctx.needs_input_grad[7 : 7 + PARAMETERS], in_place=ctx.in_place)
        with torch.autocast("cpu", enabled=False):
            gradient = gradient.contiguous()
            narrow = gradient.to(dtype)
            if middle is None:
                middle = _plus_product(hidden, attended, layer.out)
            gates_ups, normed, scale = _gates(layer, middle, weights, dtype, gates_ups)
            grad_gated = to.products_backward((6,), narrow, _gated(gates_ups), weights)
            grad_gates_ups = torch.empty_like(gates_ups)
            ops.swiglu_rows_backward(gates_ups, grad_gated, grad_gates_ups)
            del gates_ups, grad_gated
            grad_normed = to.products_backward((4, 5), grad_gates_ups, normed, weights)
            del grad_gates_ups, normed
            grad_middle = to.norm_backward(1, middle, layer.mlp_norm, scale, grad_normed, gradient)
            narrow = grad_middle.to(dtype)
            grad_attended = to.products_backward((3,), narrow, attended, weights)
            grad_attended = grad_attended.float().view(len(hidden), -1, layer.head_size)
            mixed, normed, scale = _projected(layer, hidden, weights, dtype, mixed)
            query, key, value, raw = _split(layer, mixed, cos, sin)
            plan = (prompts, ctx.sequences, layer.scaling, layer.window)
            result = attended.float().view_as(query)
            *grads, outside = attend_backward(query, key, value, *plan, result, lse, grad_attended, ctx.joins)
            grads = [grad.contiguous() for grad in grads]
            rotation = (cos, sin) if layer.rotary else (None, None)
            for index, (states, weight, head_scale) in enumerate(raw):
                if layer.rotary:
                    ops.rotate(grads[index], cos, sin, True, grads[index])
                grads[index] = to.norm_backward(12 + index, states, weight, head_scale, grads[index], None)
            grad_mixed = torch.empty_like(mixed)
            ops.join_heads(*grads, *((None, None) if raw else rotation), grad_mixed)
            grad_normed = to.products_backward((0, 1, 2), grad_mixed, normed, weights)
            to.add_biases((9, 10, 11), grad_mixed)
            grad_hidden = to.norm_backward(0, hidden, layer.norm, scale, grad_normed, grad_middle)
        return grad_hidden, None, None, None, None, None, None, *to.made, *outside


class _Gradients:
    """Gradients of a layer's parameters, by index in the arguments: added to `.grad`, or returned to autograd."""

    def __init__(self, layer: Layer, wanted: tuple[bool, ...], *, in_place: bool):
        self.linears, self.parameters = layer.linears, _parameters(layer)
        self.wanted, self.in_place = wanted, in_place
        self.made: list[Tensor | None] = [None] * PARAMETERS

    def add(self, place: int, gradient: Tensor) -> None:
        """Add one gradient to `.grad` of its parameter, or keep it for autograd."""
        parameter = self.parameters[place]
        assert parameter is not None
        buffer = gradient_buffer(parameter, self.in_place)
        if buffer is None:
            self.made[place] = gradient.to(parameter.dtype)
        else:
            buffer += gradient

    def products_backward(
        self, indices: tuple[int, ...], gradient: Tensor, states: Tensor, weights: list[Tensor]
    ) -> Tensor:
        """Add the gradients of linear layers that multiply the same states. Return the gradient of the states.

        Args:
            indices: of the linear layers.
            gradient: [T, outputs of all these layers].
            states: [T, inputs].
            weights: of all linear layers of the layer.
        """
        grad_states, first = _joint_product_backward(gradient, [weights[index] for index in indices]), 0
        for index in indices:
            part = gradient[:, first : first + len(weights[index])]
            first += len(weights[index])
            if self.wanted[2 + index]:
                parameter = self.linears[index].weight
                buffer = gradient_buffer(parameter, self.in_place)
                if buffer is not None and part.dtype == torch.float32:
                    buffer.addmm_(part.T, states)
                else:
                    self.add(2 + index, part.T @ states)
            adapter = self.linears[index].adapter
            if adapter is not None:
                a, b = (tensor.detach().to(gradient.dtype) for tensor in (adapter.a, adapter.b))
                grad_low = (part @ b).mul_(adapter.scale)
                for place, made in ((0, (grad_low, states)), (1, (part, (states @ a.T).mul_(adapter.scale)))):
                    if self.wanted[ADAPTERS + 2 * index + place]:
                        self.add(ADAPTERS + 2 * index + place, made[0].T @ made[1])
                grad_states.addmm_(grad_low, a)
        return grad_states

    def add_biases(self, places: tuple[int, ...], gradient: Tensor) -> None:
        """Add the gradients of the biases at `places` from the gradient [T, outputs of all] of their results."""
        if any(self.wanted[place] for place in places):
            total, first = gradient.sum(0, dtype=torch.float32), 0
            for place in places:
                parameter = self.parameters[place]
                assert parameter is not None
                if self.wanted[place]:
                    self.add(place, total[first : first + len(parameter)])
                first += len(parameter)

    def norm_backward(
        self, place: int, hidden: Tensor, weight: Tensor, scale: Tensor, gradient: Tensor, add: Tensor | None
    ) -> Tensor:
        """Add the gradient of a norm's weight and return the gradient of `hidden`, plus `add` if there is one."""
        grad_hidden, shares = torch.empty_like(hidden), hidden.new_zeros(threads_for(hidden.numel()), hidden.shape[-1])
        ops.rms_norm_backward(hidden, weight, scale, gradient, add, grad_hidden, shares)
        if self.wanted[place]:
            self.add(place, shares.sum(0))
        return grad_hidden


def _projected(
    layer: Layer, hidden: Tensor, weights: list[Tensor], dtype: torch.dtype, mixed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the joint projections of query, key and value, unless they are given, and the normed states and scales."""
    normed, scale = _normed(hidden, layer.norm, layer.epsilon, dtype)
    if mixed is None:
        mixed = _joint_product(normed, weights[:3])
        _add_adapters(mixed, normed, layer.linears[:3])
        if layer.query.bias is not None:
            mixed += torch.cat([part.bias for part in layer.linears[:3] if part.bias is not None])
    return mixed, normed, scale


def _gates(
    layer: Layer, middle: Tensor, weights: list[Tensor], dtype: torch.dtype, gates_ups: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gates and ups [T, 2 I], unless they are given, and the normed states and scales."""
    normed, scale = _normed(middle, layer.mlp_norm, layer.mlp_epsilon, dtype)
    if gates_ups is None:
        gates_ups = _joint_product(normed, weights[4:6])
        _add_adapters(gates_ups, normed, layer.linears[4:6])
    return gates_ups, normed, scale


def _normed(hidden: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the normed states in `dtype`, and 1 / rms of each row [T]."""
    scale, result = hidden.new_empty(len(hidden)), torch.empty_like(hidden, dtype=dtype)
    ops.rms_norm(hidden, weight, epsilon, scale, result)
    return result, scale


def _split(
    layer: Layer, mixed: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Return query [T, H, D], key and value [T, K, D], normed and rotated, in float32.

    If there are norms of heads, the last result has, for query and key, the states before the norm, its weight, and
    1 / rms of each head.
    """
    query, key, value = (
        mixed.new_empty(len(mixed), heads, layer.head_size, dtype=torch.float32)
        for heads in (layer.heads, layer.key_heads, layer.key_heads)
    )
    if layer.query_norm is None or layer.key_norm is None:
        ops.split_heads(mixed, *((cos, sin) if layer.rotary else (None, None)), query, key, value)
        return query, key, value, []
    ops.split_heads(mixed, None, None, query, key, value)
    raw, made = [], []
    for states, weight in ((query, layer.query_norm), (key, layer.key_norm)):
        normed, scale = torch.empty_like(states), states.new_empty(states.shape[:2])
        ops.rms_norm(states, weight, layer.head_epsilon, scale, normed)
        if layer.rotary:
            ops.rotate(normed, cos, sin, False, normed)
        raw.append((states, weight, scale))
        made.append(normed)
    return made[0], made[1], value, raw


def _gated(gates_ups: Tensor) -> Tensor:
    """Return silu(gate) * up [T, I], with gates_ups [T, 2 I]."""
    result = gates_ups.new_empty(len(gates_ups), gates_ups.shape[1] // 2)
    ops.swiglu_rows(gates_ups, result)
    return result


def _joined(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return a copy of the weights in `dtype`, concatenated along the outputs."""
    joined = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1], dtype=dtype)
    for part, weight in zip(joined.split([*map(len, weights)]), weights, strict=True):
        part.copy_(weight)
    return joined


def _joint_product(states: Tensor, weights: list[Tensor]) -> Tensor:
    """Multiply states [T, inputs] by each weight [outputs, inputs] -> [T, all outputs], in the dtype of the states."""
    if states.dtype != torch.float32:
        return states @ _joined(weights, states.dtype).T
    result = states.new_empty(len(states), sum(map(len, weights)))
    for part, weight in zip(result.split([*map(len, weights)], 1), weights, strict=True):
        torch.mm(states, weight.T, out=part)
    return result


def _joint_product_backward(gradient: Tensor, weights: list[Tensor]) -> Tensor:
    """Return the gradient of the states [T, inputs] from `gradient` [T, all outputs]."""
    if gradient.dtype != torch.float32:
        return gradient @ _joined(weights, gradient.dtype)
    parts = gradient.split([*map(len, weights)], 1)
    result = parts[0] @ weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        result.addmm_(part, weight)
    return result


def _plus_product(states: Tensor, inputs: Tensor, part: Linear) -> Tensor:
    """Return states + the linear layer's result for `inputs`, in float32."""
    weight = part.weight.detach()
    if inputs.dtype == torch.float32:
        result = torch.addmm(states, inputs, weight.T)
    else:
        result = states + inputs @ weight.to(inputs.dtype).T
    _add_adapters(result, inputs, (part,))
    return result


def _add_adapters(result: Tensor, states: Tensor, parts: tuple[Linear, ...]) -> None:
    """Add the terms of adapters to the results [T, all outputs] of linear layers that multiply the same states."""
    for piece, part in zip(result.split([len(part.weight) for part in parts], 1), parts, strict=True):
        if part.adapter is not None:
            a, b = (tensor.detach().to(states.dtype) for tensor in (part.adapter.a, part.adapter.b))
            low = states @ a.T
            if piece.dtype == states.dtype:
                piece.addmm_(low, b.T, alpha=part.adapter.scale)
            else:
                piece.add_(low @ b.T, alpha=part.adapter.scale)
