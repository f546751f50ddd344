"""Optimizer state <-> named tensors that safetensors can hold."""

from typing import Any

from torch import Tensor

Tensors = dict[str, dict[str, Tensor]]
"""Tensors by group and name: {"model": {"embed.weight": ...}, "optimizer": {...}}"""


def optimizer_to_tensors(state_dict: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the state of an optimizer into named tensors and plain values for JSON, which refer to the tensors by name.

    {"state": {0: {"step": Tensor}}, ...}  ->  {"state.0.step": Tensor},  {"dict": [["state", {"dict": [[0, ...
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, dict):  # as pairs: JSON turns the parameter number 0 into the text "0"
            return {"dict": [[key, encode(item, f"{name}.{key}" if name else str(key))] for key, item in value.items()]}
        if isinstance(value, tuple):  # betas: JSON turns them into a list
            return {"tuple": [encode(item, f"{name}.{index}") for index, item in enumerate(value)]}
        if isinstance(value, list):
            return [encode(item, f"{name}.{index}") for index, item in enumerate(value)]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(
            f"optimizer state {name} is a {type(value).__name__}: only tensors and plain values can be saved"
        )

    return tensors, encode(state_dict, "")


def optimizer_from_tensors(tensors: dict[str, Tensor], encoded: Any) -> Any:
    """Return the state that `optimizer_to_tensors` has split."""
    if isinstance(encoded, list):
        return [optimizer_from_tensors(tensors, item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    [(kind, content)] = encoded.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(optimizer_from_tensors(tensors, item) for item in content)
    return {key: optimizer_from_tensors(tensors, item) for key, item in content}
