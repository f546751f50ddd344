"""Lean parts: RMSNorm, SwiGLU and RoPE whose gradients are written by hand, in place of a model's own -> the same numbers, less
memory and fewer passes over it.

Left to autograd, a norm keeps three tensors as large as its input and a gated MLP four as large as its inside. Here a norm keeps
its input and one number per token, and an MLP its two projections; the rest is formed again on the way back. Used on CPUs,
where each avoided pass over memory is time; a GPU has fused kernels for both. In float32, and where there is a C compiler
(grpo/compiled.py), each is one pass of lean.c; what stands here in torch is the same, in every other dtype, and everywhere else.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grpo.compiled import lean_library, plain, pointer, threads_for
from grpo.products import Linear, fits, product, weight_gradient


def rotate_leanly(models: Any) -> None:
    """The attention layers of `models`, a module of transformers, find their RoPE by the name that it has there."""
    stock = models.apply_rotary_pos_emb
    if getattr(stock, "lean", False):
        return

    def apply_rotary_pos_emb(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """query [B, H, T, D], key [B, K, T, D], cos and sin [B, T, D] -> both, turned"""
        rows = (query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        fits = cos.shape == (query.shape[0], query.shape[2], query.shape[3]) and unsqueeze_dim == 1
        if not fits or lean_library() is None or not plain(*rows):
            turned: tuple[Tensor, Tensor] = stock(query, key, cos, sin, unsqueeze_dim)
            return turned
        query, key = (_RoPE.apply(states, cos, sin).transpose(1, 2) for states in rows[:2])
        return query, key

    apply_rotary_pos_emb.lean = True  # type: ignore[attr-defined]
    models.apply_rotary_pos_emb = apply_rotary_pos_emb


class Norm(nn.Module):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden: Tensor) -> Tensor:
        normed: Tensor = _RMSNorm.apply(hidden, self.weight, self.variance_epsilon)
        return normed


class MLP(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden: Tensor) -> Tensor:
        parts = (self.gate_proj, self.up_proj, self.down_proj)
        down: Tensor
        if all(type(part) is Linear and part.bias is None for part in parts) and fits(hidden, *self.parameters()):
            down = _GatedMLP.apply(hidden, *(part.weight for part in parts))
        else:  # with biases or adapters, in 16 bits, or where there is no compiler
            down = self.down_proj(_SwiGLU.apply(self.gate_proj(hidden), self.up_proj(hidden)))
        return down


class _RMSNorm(torch.autograd.Function):
    """y = w * x / rms(x), over the last dimension (arXiv 1910.07467); the statistics in float32.

    With r = 1 / rms(x) and g the gradient of y:  dx = r * (w g - x r^2 mean(w g x)),  dw = sum over tokens of g x r
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        if lean_library() is not None and plain(hidden, weight):
            result, scale = normed(hidden, weight, epsilon)
            ctx.save_for_backward(hidden, weight, scale)
            return result
        with torch.autocast(hidden.device.type, enabled=False):
            wide = hidden.float()
            scale = torch.rsqrt(torch.linalg.vecdot(wide, wide)[..., None] / wide.shape[-1] + epsilon)
            ctx.save_for_backward(hidden, weight, scale)
            return (wide * scale).to(hidden.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, scale = ctx.saved_tensors
        if lean_library() is not None and plain(hidden, weight, scale, gradient):
            return *norm_gradients(hidden, weight, scale, gradient), None
        grad_hidden = grad_weight = None
        with torch.autocast(hidden.device.type, enabled=False):
            wide, gradient, factor = hidden.float(), gradient.float(), weight.float()
            product = gradient * wide
            if ctx.needs_input_grad[0]:
                correction = (product @ factor)[..., None] * scale**3 / -wide.shape[-1]
                grad_hidden = (gradient * factor).mul_(scale).addcmul_(wide, correction).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (scale.flatten() @ product.flatten(0, -2)).to(weight.dtype)
        return grad_hidden, grad_weight, None


def normed(hidden: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """In C: RMSNorm of hidden [..., H], and 1 / rms [..., 1]."""
    result, scale = torch.empty_like(hidden), hidden.new_empty(*hidden.shape[:-1], 1)
    shape = (threads_for(hidden.numel()), scale.numel(), hidden.shape[-1], epsilon)
    lean_library().norm(*shape, *map(pointer, (hidden, weight, scale, result)))
    return result, scale


def norm_gradients(hidden: Tensor, weight: Tensor, scale: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """In C: of hidden and weight, from that of the norm."""
    threads, size = threads_for(hidden.numel()), hidden.shape[-1]
    grad_hidden, shares = torch.empty_like(hidden), hidden.new_zeros(threads, size)
    tensors = (hidden, weight, scale, gradient, grad_hidden, shares)
    lean_library().norm_backward(threads, scale.numel(), size, *map(pointer, tensors))
    return grad_hidden, shares.sum(0)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202)"""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gated_gradients(gate, up, gradient)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up"""
    library = lean_library() if plain(gate, up) else None
    if library is not None:
        result = torch.empty_like(gate)
        library.swiglu(threads_for(gate.numel()), gate.numel(), *map(pointer, (gate, up, result)))
        return result
    return F.silu(gate).mul_(up)


def gated_gradients(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and up, from that of silu(gate) * up."""
    library = lean_library() if plain(gate, up, gradient) else None
    if library is not None:
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        tensors = (gate, up, gradient, grad_gate, grad_up)
        library.swiglu_backward(threads_for(gate.numel()), gate.numel(), *map(pointer, tensors))
        return grad_gate, grad_up
    return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class _GatedMLP(torch.autograd.Function):
    """down(silu(gate) * up) in one: hidden [..., H], gate and up weights [I, H], down [H, I] -> [..., H]. Of the inside, two projections
    are kept; their product is formed again on the way back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *weights: Tensor) -> Tensor:
        states = hidden.flatten(0, -2)
        result, gate, up = gated_mlp(states, weights)
        ctx.save_for_backward(states if any(ctx.needs_input_grad[1:3]) else None, gate, up, *weights)
        ctx.weights = weights  # themselves, whatever is done to what is saved
        return result.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, gate, up, *weights = ctx.saved_tensors
        shape, gradient = gradient.shape, gradient.flatten(0, -2).contiguous()
        grad_states, grads = mlp_gradients(
            gradient, states, gate, up, weights, owners=ctx.weights, wanted=ctx.needs_input_grad
        )
        return None if grad_states is None else grad_states.view(shape), *grads


def gated_mlp(states: Tensor, weights: Sequence[Tensor], into: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """In C: states [T, H] and the weights of gate, up and down -> [T, H], added to `into` where that is given; the gate and up
    projections [T, I]."""
    gate, up = (product(states, weight, b_across=True) for weight in weights[:2])
    return product(gated(gate, up), weights[2], b_across=True, into=into), gate, up


def mlp_gradients(
    gradient: Tensor,
    states: Tensor | None,
    gate: Tensor,
    up: Tensor,
    weights: Sequence[Tensor],
    *,
    owners: Sequence[Tensor],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """In C: of states [T, H], and of the three weights, from that of what `gated_mlp` gave. `owners`: the weights as the model has them,
    whose .grad may be added to; `wanted`: whether states, gate, up and down want a gradient."""
    grad_gate, grad_up = gated_gradients(gate, up, product(gradient, weights[2]))
    grad_states = product(grad_up, weights[1], into=product(grad_gate, weights[0])) if wanted[0] else None
    grads: list[Tensor | None] = [None, None, None]
    for index, grad in enumerate((grad_gate, grad_up)):
        if wanted[1 + index]:
            assert states is not None
            grads[index] = weight_gradient(grad, states, owners[index])
    if wanted[3]:
        grads[2] = weight_gradient(gradient, gated(gate, up), owners[2])
    return grad_states, grads


class _RoPE(torch.autograd.Function):
    """Rotary position embedding (arXiv 2104.09864) of states [B, T, heads, D]; a rotation's gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(states, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return turned(gradient.contiguous(), *ctx.saved_tensors, back=True), None, None


def turned(states: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    result = torch.empty_like(states)
    tokens, (heads, size) = states.shape[0] * states.shape[1], states.shape[2:]
    tensors = (states, cos, sin, result)
    lean_library().rotate(threads_for(states.numel()), tokens, heads, size, back, *map(pointer, tensors))
    return result
