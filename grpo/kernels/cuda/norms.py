"""RMSNorm (arXiv 1910.07467) of modules on CUDA: one launch forward, and no intermediate result that is kept.

Written out in PyTorch, as in transformers, it is six launches, and keeps three tensors of the size of the input.
"""

import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.registry import is_on


def is_available(hidden: Tensor, weight: Tensor) -> bool:
    """Return whether `rms_norm` may be used: on CUDA, where both have the same dtype."""
    return hidden.is_cuda and hidden.dtype == weight.dtype and is_on("fused_norm")


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return weight * hidden / rms(hidden), with statistics in float32.

    Args:
        hidden: [..., H].
        weight: [H], of the same dtype.
        epsilon: is added to the mean square.
    """
    return F.rms_norm(hidden, weight.shape, weight, epsilon).to(hidden.dtype)  # autocast may have widened it
