"""Gradients that are added to `.grad` in place."""

import torch
from torch import Tensor


def gradient_buffer(weight: Tensor, accumulate_grads_inplace: bool) -> Tensor | None:
    """Return `.grad` of `weight` if its gradient may be added there in place. None: return the gradient to autograd.

    Requires a float32 leaf that requires gradients. A missing `.grad` is created as zeros.
    """
    if not (accumulate_grads_inplace and weight.is_leaf and weight.requires_grad and weight.dtype == torch.float32):
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
