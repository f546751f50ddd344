"""RMSNorm, SwiGLU and rotary embedding with hand-written backward passes, which keep less memory.

With autograd's gradients, a norm keeps three tensors of the size of its input, and a gated MLP four of its
intermediate size. Here a norm keeps its input and one number per token, and an MLP its two projections. The backward
pass recomputes the rest. On a CPU each avoided pass over memory saves time. GPUs have fused kernels for both. In
float32 and with a C compiler, each operation is one pass of fused_ops.c.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.cpu import ops
from grpo.kernels.cpu.compiler import c_kernel, threads_for


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension, with statistics in float32."""
    normed: Tensor = RMSNorm.apply(hidden, weight, epsilon)
    return normed


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU (arXiv 2002.05202): silu(gate) * up."""
    gated: Tensor = SwiGLU.apply(gate, up)
    return gated


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of states [T, heads, D] by cos and sin [T, D]."""
    if c_kernel("decoder_layer", states, cos, sin):
        rotated: Tensor = Rotation.apply(states, cos, sin)
        return rotated
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


class RMSNorm(torch.autograd.Function):
    """RMSNorm: y = w * x / rms(x).

    With r = 1 / rms(x) and g the gradient of y:  dx = r * (w g - x r^2 mean(w g x)),  dw = sum over tokens of g x r
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        if c_kernel("decoder_layer", hidden, weight):
            result, scale = torch.empty_like(hidden), hidden.new_empty(*hidden.shape[:-1], 1)
            ops.rms_norm(hidden, weight, epsilon, scale, result)
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
        if c_kernel("decoder_layer", hidden, weight, scale, gradient):
            grad_hidden = torch.empty_like(hidden)
            shares = hidden.new_zeros(threads_for(hidden.numel()), hidden.shape[-1])
            ops.rms_norm_backward(hidden, weight, scale, gradient, None, grad_hidden, shares)
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


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Keeps only its inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if c_kernel("decoder_layer", gate, up):
            result = torch.empty_like(gate)
            ops.swiglu(gate, up, result)
            return result
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if c_kernel("decoder_layer", gate, up, gradient):
            grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
            ops.swiglu_backward(gate, up, gradient, grad_gate, grad_up)
            return grad_gate, grad_up
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class Rotation(torch.autograd.Function):
    """Rotary embedding in C. The gradient of a rotation is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        result = torch.empty_like(states)
        ops.rotate(states, cos, sin, False, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous()
        result = torch.empty_like(gradient)
        ops.rotate(gradient, *ctx.saved_tensors, True, result)
        return result, None, None
