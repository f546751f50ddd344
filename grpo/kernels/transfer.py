"""Copies between the host and a device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor`, which is on the CPU, on `device`. On CUDA, the host does not wait for the copy."""
    if device.type == "cuda" and tensor.is_cpu:
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(device, non_blocking=True)
    return tensor.to(device)


def on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on the CPU, in pinned memory if it is to be copied to a CUDA `device` often."""
    tensor = tensor.cpu()
    return tensor.pin_memory() if device.type == "cuda" else tensor
