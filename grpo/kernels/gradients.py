"""Gradients that are added to .grad in place."""

import torch
from torch import Tensor


def gradient_buffer(weight: Tensor, accumulate_grads_inplace: bool) -> Tensor | None:
    """.grad of `weight`, to add its gradient to; None where autograd is to have it."""
    if not (accumulate_grads_inplace and weight.is_leaf and weight.requires_grad and weight.dtype == torch.float32):
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
