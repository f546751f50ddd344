"""LoRA layers in 16 bits: the adapter's term is added before the sum is rounded.

peft rounds W x first and then adds: y = round(round(W x) + B A x). A term below half a unit in the last place of W x is
lost there, whatever its sign. Here y = round(W x + B A x), with the sum in float32: what is lost by rounding one token
is made up for by others.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grpo.kernels.decode import add_wide_product, wide_product

NARROW = (torch.bfloat16, torch.float16)


def widen(layer: nn.Module) -> None:
    """Let a LoRA layer of peft add up in float32 where it computes in 16 bits, if it is linear, also in 4 bits."""
    base = layer.get_base_layer()  # type: ignore[operator]
    if not isinstance(base, nn.Linear) or hasattr(layer, "parameter_name"):
        return
    if base.weight.is_floating_point() or hasattr(base.weight, "quant_state"):
        layer.__class__ = _wide_class(type(layer))  # type: ignore[arg-type]


@functools.cache
def _wide_class(kind: type) -> type:
    class Wide(kind):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            dtype = compute_dtype(x, self.get_base_layer())
            if dtype is None or self.merged or args or kwargs or self.lora_variant:
                return super().forward(x, *args, **kwargs)
            if self.disable_adapters:  # the reference: rounded alike, so that the KL to it starts at exactly 0
                if torch.is_grad_enabled():
                    return super().forward(x)
                with torch.autocast(x.device.type, enabled=False):
                    return base_sum(x, self.get_base_layer(), dtype)
            [name] = self.active_adapters
            low, high = self.lora_A[name].weight, self.lora_B[name].weight
            with torch.autocast(x.device.type, enabled=False):
                return _WideSum.apply(x, low, high, self.get_base_layer(), self.scaling[name], dtype)

    Wide.__name__ = Wide.__qualname__ = kind.__name__  # saved names and messages are those of peft
    return Wide


def compute_dtype(x: Tensor, base: nn.Module) -> torch.dtype | None:
    """Return the 16-bit dtype that `base` computes in; None if it computes in float32."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = getattr(base, "compute_dtype", None) or base.weight.dtype  # type: ignore[assignment]
    return dtype if dtype in NARROW else None


def _weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the frozen weight [O, I] in `dtype`."""
    weight: Any = base.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    return weight.detach().to(dtype)


def wide_sum(rows: Tensor, inner: Tensor, high: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows W^T + bias + inner high^T [T, O] in float32, from 16-bit numbers."""
    total = wide_product(rows, weight)
    if bias is not None:
        total += bias
    return add_wide_product(total, inner, high)


def base_sum(x: Tensor, base: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return round(x W^T + bias) [..., O], bit for bit the layer's output while the adapter's term is 0."""
    total = wide_product(x.to(dtype).flatten(0, -2), _weight(base, dtype))
    if base.bias is not None:
        total += base.bias
    return total.to(dtype).view(*x.shape[:-1], -1)


class _WideSum(torch.autograd.Function):
    """round(x W^T + bias + scale * (x A^T) B^T), with products of 16-bit numbers and a float32 sum.

    The weight is read again in the backward pass, so that no copy of it in 16 bits is kept.
    """

    @staticmethod
    def forward(
        context: Any, x: Tensor, low: Tensor, high: Tensor, base: nn.Linear, scale: float, dtype: torch.dtype
    ) -> Tensor:
        rows = x.to(dtype).flatten(0, -2)
        low_16, high_16 = low.to(dtype), (scale * high.float()).to(dtype)
        inner = F.linear(rows, low_16)
        total = wide_sum(rows, inner, high_16, _weight(base, dtype), base.bias)
        context.save_for_backward(rows, inner, low, high)
        context.base, context.scale, context.dtype, context.input = base, scale, dtype, (x.shape, x.dtype)
        return total.to(dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Any:
        rows, inner, low, high = context.saved_tensors
        dtype, (shape, input_dtype) = context.dtype, context.input
        upstream = gradient.to(dtype).flatten(0, -2)
        low_16, high_16 = low.to(dtype), (context.scale * high.float()).to(dtype)
        below = upstream @ high_16
        x_gradient = None
        if context.needs_input_grad[0]:
            x_gradient = (upstream @ _weight(context.base, dtype) + below @ low_16).to(input_dtype).view(shape)
        low_gradient = (below.T @ rows).to(low.dtype)
        high_gradient = context.scale * (upstream.T @ inner).to(high.dtype)
        return x_gradient, low_gradient, high_gradient, None, None, None
