"""Experts of a mixture in 16 bits: autocast leaves the stacked matrices [E, ., .] of transformers' layers alone.

Their products (`grouped_mm`) are not in autocast's list and take the dtype of the weights. In float32, a GPU multiplies
them expert by expert, and the host waits for the number of tokens of each: no CUDA graph can be captured. Here they are
cast as autocast casts the weights of linear layers.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 8
"""Numbers of 16 bits in 16 bytes: the grouped products of GPUs need rows of a multiple of that."""
_ADAPTED = "adapted_weights"


def use_grpo_experts(model: nn.Module) -> bool:
    """Let the stacked experts of `model` compute in the dtype of autocast. Without autocast, nothing changes.

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
    adapted = vars(module).get(_ADAPTED, ())
    return [
        name
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3 and weight.is_floating_point() and name not in adapted
        if all(size % ALIGNMENT == 0 for size in weight.shape[1:])
    ]


def keep_dtype(module: nn.Module, name: str) -> None:
    """Leave the parameter `name` of `module` in its dtype: it has an adapter, which is added to it.

    Rounded to 16 bits, the sum would lose small changes. Without the adapter (the reference), it computes alike.
    """
    vars(module).setdefault(_ADAPTED, set()).add(name)


def _is_stacked(module: nn.Module) -> bool:
    return {"config", "has_gate", "is_transposed"} <= vars(module).keys()


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device = hidden_states.device.type
    layer = _Cast(self, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else self
    output: Tensor = type(self).forward(layer, hidden_states, *args, **kwargs)
    return output


class _Cast:
    """The attributes of a layer, with its stacked weights in `dtype`."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self._layer = layer
        for name in cast_weights(layer):
            setattr(self, name, getattr(layer, name).to(dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)
