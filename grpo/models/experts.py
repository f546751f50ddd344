"""Experts of a mixture in 16 bits: autocast leaves the stacked matrices [E, ., .] of transformers' layers alone.

Their products (`grouped_mm`) are not in autocast's list and take the dtype of the weights. In float32, a GPU multiplies
them expert by expert, and the host waits for the number of tokens of each: no CUDA graph can be captured. Here they are
cast as autocast casts the weights of linear layers, and adapters are added as in lora_wide.py: in float32, before the
sum is rounded. peft would add them to the weights, where rounding to 16 bits loses small changes.

    E experts    S pairs of a token and an expert, sorted by expert    K, N inputs and outputs of an expert    R rank
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ALIGNMENT = 8
"""Numbers of 16 bits in 16 bytes: the grouped products of GPUs need rows of a multiple of that."""
NARROW = (torch.bfloat16, torch.float16)
_ADAPTERS = "expert_adapters"


def use_grpo_experts(model: nn.Module) -> bool:
    """Let the stacked experts of `model` compute in the dtype of autocast. In float32, nothing changes.

    Returns:
        True if the model has such layers.
    """
    found = [module for module in model.modules() if _is_stacked(module)]
    for module in found:
        module.forward = MethodType(_forward, module)
    return bool(found)


def cast_weights(module: nn.Module) -> list[str]:
    """Return the names of the parameters of `module` that are stacked experts and are cast under autocast."""
    if not _is_stacked(module):
        return []
    kept = () if _adds_adapters(module) else vars(module).get(_ADAPTERS, ())
    return [
        name
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3 and weight.is_floating_point() and name not in kept
        if all(size % ALIGNMENT == 0 for size in weight.shape[1:])
    ]


def widen_experts(layer: Any) -> None:
    """Let peft's layer of one stacked matrix add its adapter to products, and not to the matrix, in 16 bits."""
    experts = layer.get_base_layer()
    if not _is_stacked(experts):
        return
    vars(experts).setdefault(_ADAPTERS, {})[layer.parameter_name] = layer
    layer.forward = MethodType(_forward_of_adapter, layer)


def _is_stacked(module: nn.Module) -> bool:
    return {"config", "has_gate", "is_transposed"} <= vars(module).keys()


def _adds_adapters(module: Any) -> bool:
    return "forward" in vars(module) and module.config._experts_implementation == "grouped_mm"


def _compute_dtype(layer: nn.Module, hidden_states: Tensor) -> torch.dtype | None:
    """Return the 16-bit dtype that `layer` computes in; None if it computes in float32."""
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype = next(layer.parameters()).dtype
    return dtype if dtype in NARROW else None


def _forward_of_adapter(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    experts = self.get_base_layer()
    direct = self.parameter_name in cast_weights(experts) and _compute_dtype(experts, hidden_states) is not None
    call = self.base_layer if direct else MethodType(type(self).forward, self)
    output: Tensor = call(hidden_states, *args, **kwargs)
    return output


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dtype = _compute_dtype(self, hidden_states)
    output: Tensor = type(self).forward(self if dtype is None else _Cast(self, dtype), hidden_states, *args, **kwargs)
    return output


class _Cast:
    """The attributes of a layer, with its stacked weights in `dtype`."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self._layer = layer
        adapters = vars(layer).get(_ADAPTERS, {})
        for name in cast_weights(layer):
            weight = getattr(layer, name)
            adapted = name in adapters
            setattr(self, name, _Adapted(weight, *_factors(adapters[name], dtype)) if adapted else weight.to(dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _factors(adapter: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A [E, K, R] and s B [E, R, N], with R filled up with zeros. B is 0 where the adapter is disabled.

    The same products then run with and without the adapter, so that the KL to the reference starts at exactly 0.
    """
    [name] = adapter.active_adapters
    low, high, experts = adapter.lora_A[name].weight, adapter.lora_B[name].weight, adapter.num_experts
    low_ERK = low.reshape(experts, -1, low.shape[1])
    high_ERN = high.reshape(len(high), -1, experts).permute(2, 1, 0)
    missing = -low_ERK.shape[1] % ALIGNMENT
    scale = 0.0 if adapter.disable_adapters or adapter.merged else adapter.scaling[name]
    low_ERK, high_ERN = (F.pad(part, (0, 0, 0, missing)) for part in (low_ERK, scale * high_ERN.float()))
    return low_ERK.to(dtype).transpose(1, 2), high_ERN.to(dtype).contiguous()


class _Adapted:
    """W + A (s B) of each expert, the right side of grouped products: for torch a tensor, whose sum is never formed."""

    def __init__(self, weight: Tensor, low_EKR: Tensor, high_ERN: Tensor) -> None:
        self.weight, self.low_EKR, self.high_ERN = weight, low_EKR, high_ERN
        self.dtype, self.device = low_EKR.dtype, weight.device

    def transpose(self, first: int, second: int) -> "_Adapted":
        """Return it with W, which may be stored as [E, N, K], transposed."""
        return _Adapted(self.weight.transpose(first, second), self.low_EKR, self.high_ERN)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        left, right = args[:2]
        return _AdaptedProduct.apply(left, right.weight, right.low_EKR, right.high_ERN, kwargs["offs"], func)


Product = Callable[..., Tensor]


class _AdaptedProduct(torch.autograd.Function):
    """x W + (x A) (s B) for the rows of each expert, in one product: [x, x A] times [W; s B].

    W is frozen, and read again in the backward pass, so that no copy of it in 16 bits is kept.
    """

    @staticmethod
    def forward(
        context: Any, x_SK: Tensor, weight_EKN: Tensor, low_EKR: Tensor, high_ERN: Tensor, ends_E: Tensor, func: Product
    ) -> Tensor:
        inner_SR = func(x_SK, low_EKR, offs=ends_E)
        context.save_for_backward(x_SK, inner_SR, weight_EKN, low_EKR, high_ERN, ends_E)
        context.func = func
        right = torch.cat([weight_EKN.to(x_SK.dtype), high_ERN], 1)
        return func(torch.cat([x_SK, inner_SR], 1), right, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_SN: Tensor) -> Any:
        x_SK, inner_SR, weight_EKN, low_EKR, high_ERN, ends_E = context.saved_tensors
        func, upstream_SN = context.func, gradient_SN.to(x_SK.dtype).contiguous()
        below_SR = func(upstream_SN, high_ERN.transpose(1, 2), offs=ends_E)
        left = torch.cat([upstream_SN, below_SR], 1)
        right = torch.cat([weight_EKN.to(x_SK.dtype).transpose(1, 2), low_EKR.transpose(1, 2)], 1)
        low_gradient = torch._grouped_mm(x_SK.T, below_SR, offs=ends_E)
        high_gradient = torch._grouped_mm(inner_SR.T, upstream_SN, offs=ends_E)
        return func(left, right, offs=ends_E), None, low_gradient, high_gradient, None, None
