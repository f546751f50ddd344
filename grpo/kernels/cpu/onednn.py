"""Products by oneDNN with weights in its own layout, for the few rows of a decoding step. Needs no compiler.

A product of a dozen rows with a weight in its plain layout takes up to four times as long.
"""

import torch
from torch import Tensor

from grpo.kernels.registry import is_on


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this build of PyTorch can reorder float32 weights on `device`."""
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and is_on("onednn")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def packed(weight: Tensor) -> Tensor:
    """Return `weight` [O, I] in oneDNN's layout, for `linear`."""
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.float().contiguous())
    return reordered


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply states [B, I] by a weight [O, I], packed or plain, and add the bias -> [B, O]."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return result


def padded_rows(rows: int) -> int:
    """Return the number of rows to compute for `rows` rows: a multiple of 4 up to 32, then a multiple of 16.

    oneDNN compiles and keeps half a megabyte of code for each number of rows.
    """
    step = 4 if rows <= 32 else 16
    return -(-rows // step) * step
