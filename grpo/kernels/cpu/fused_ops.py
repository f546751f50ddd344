"""Lean parts: RMSNorm, SwiGLU and RoPE whose gradients are written by hand, in place of a model's own -> the same numbers, less
memory and fewer passes over it.

Left to autograd, a norm keeps three tensors as large as its input and a gated MLP four as large as its inside. Here a norm keeps
its input and one number per token, and an MLP its two projections; the rest is formed again on the way back. Used on CPUs,
where each avoided pass over memory is time; a GPU has fused kernels for both. In float32, and where there is a C compiler
(grpo/kernels/cpu/compiler.py), each is one pass of fused_ops.c; what stands here in torch is the same, in every other dtype, and everywhere else.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grpo.kernels.cpu.compiler import kernels, plain, pointer, threads_for
from grpo.kernels.cpu.gemm import Linear, fits, product, weight_gradient


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
        if not fits or kernels() is None or not plain(*rows):
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
        library = kernels() if plain(hidden, weight) else None
        if library is not None:
            result, scale = torch.empty_like(hidden), hidden.new_empty(*hidden.shape[:-1], 1)
            shape = (threads_for(hidden.numel()), scale.numel(), hidden.shape[-1], epsilon)
            library.norm(*shape, pointer(hidden), pointer(weight), pointer(scale), pointer(result))
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
        grad_hidden = grad_weight = None
        library = kernels() if plain(hidden, weight, scale, gradient) else None
        if library is not None:
            threads, size = threads_for(hidden.numel()), hidden.shape[-1]
            grad_hidden, shares = torch.empty_like(hidden), hidden.new_zeros(threads, size)
            tensors = (hidden, weight, scale, gradient, None, grad_hidden, shares)
            library.norm_backward(threads, scale.numel(), size, *map(pointer, tensors))
            return grad_hidden, shares.sum(0), None
        with torch.autocast(hidden.device.type, enabled=False):
            wide, gradient, factor = hidden.float(), gradient.float(), weight.float()
            product = gradient * wide
            if ctx.needs_input_grad[0]:
                correction = (product @ factor)[..., None] * scale**3 / -wide.shape[-1]
                grad_hidden = (gradient * factor).mul_(scale).addcmul_(wide, correction).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (scale.flatten() @ product.flatten(0, -2)).to(weight.dtype)
        return grad_hidden, grad_weight, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202)"""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _gated_gradients(gate, up, gradient)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up"""
    library = kernels() if plain(gate, up) else None
    if library is not None:
        result = torch.empty_like(gate)
        library.swiglu(threads_for(gate.numel()), gate.numel(), *map(pointer, (gate, up, result)))
        return result
    return F.silu(gate).mul_(up)


def _gated_gradients(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and up, from that of silu(gate) * up."""
    library = kernels() if plain(gate, up, gradient) else None
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
    def forward(ctx: Any, hidden: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
        states = hidden.flatten(0, -2)
        gate, up = (product(states, weight, b_across=True) for weight in (gate_weight, up_weight))
        kept = states if any(ctx.needs_input_grad[1:3]) else None
        ctx.save_for_backward(kept, gate, up, gate_weight, up_weight, down_weight)
        ctx.weights = (gate_weight, up_weight, down_weight)  # themselves, whatever is done to what is saved
        return product(_gated(gate, up), down_weight, b_across=True).view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        shape, gradient = gradient.shape, gradient.flatten(0, -2).contiguous()
        inside = product(gradient, down_weight)
        grad_gate, grad_up = _gated_gradients(gate, up, inside)
        wanted = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 4
        if wanted[0]:
            grads[0] = product(grad_up, up_weight, into=product(grad_gate, gate_weight)).view(shape)
        if wanted[1]:
            grads[1] = weight_gradient(grad_gate, states, ctx.weights[0])
        if wanted[2]:
            grads[2] = weight_gradient(grad_up, states, ctx.weights[1])
        if wanted[3]:
            grads[3] = weight_gradient(gradient, _gated(gate, up), ctx.weights[2])
        return tuple(grads)


class _RoPE(torch.autograd.Function):
    """Rotary position embedding (arXiv 2104.09864) of states [B, T, heads, D]; a rotation's gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(states, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _turned(gradient.contiguous(), *ctx.saved_tensors, back=True), None, None


def _turned(states: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    result = torch.empty_like(states)
    tokens, (heads, size) = states.shape[0] * states.shape[1], states.shape[2:]
    tensors = (states, cos, sin, result)
    kernels().rotate(threads_for(states.numel()), tokens, heads, size, back, *map(pointer, tensors))
    return result
