"""Lean layers: RMSNorm and SwiGLU whose gradients are written by hand, in place of a model's own -> the same numbers, less memory.

Left to autograd, a norm keeps three tensors as large as its input and a gated MLP four as large as its inside. Here a norm keeps
its input and one number per token, and an MLP its two projections; the rest is formed again on the way back. Used on CPUs,
where each avoided pass over memory is time; a GPU has fused kernels for both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP")
"""The classes of transformers whose forward pass is the one that is written here."""


def use_lean_layers(model: PreTrainedModel) -> None:
    """Give the norms and MLPs of `model` that are known the forward and backward passes below."""
    for module in model.modules():
        name = type(module).__name__
        if name in NORMS:
            module.__class__ = _Norm
        elif name in MLPS and getattr(model.config, "hidden_act", None) == "silu":
            module.__class__ = _MLP


class _Norm(nn.Module):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden: Tensor) -> Tensor:
        normed: Tensor = _RMSNorm.apply(hidden, self.weight, self.variance_epsilon)
        return normed


class _MLP(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden: Tensor) -> Tensor:
        down: Tensor = self.down_proj(_SwiGLU.apply(self.gate_proj(hidden), self.up_proj(hidden)))
        return down


class _RMSNorm(torch.autograd.Function):
    """y = w * x / rms(x), over the last dimension (arXiv 1910.07467); the statistics in float32.

    With r = 1 / rms(x) and g the gradient of y:  dx = r * (w g - x r^2 mean(w g x)),  dw = sum over tokens of g x r
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            wide = hidden.float()
            scale = torch.rsqrt(torch.linalg.vecdot(wide, wide)[..., None] / wide.shape[-1] + epsilon)
            ctx.save_for_backward(hidden, weight, scale)
            return (wide * scale).to(hidden.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, scale = ctx.saved_tensors
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


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202)"""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)
