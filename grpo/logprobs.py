"""Logprobs: hidden states -> log p(token) and entropy per token, in chunks, so that [N, V] never exists at once."""

import torch
from torch import Tensor

from grpo.kernels.head import TokenLogprobs, product_dtype


def token_logprobs(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    *,
    entropy_gradient: bool = False,
    accumulate_grads_inplace: bool = False,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of the distribution it was drawn from, p = softmax(hidden @ head.T / temperature).

    Gradients flow to hidden states and head through the logprobs.

    Args:
        hidden_NH: [N, H], any float dtype: row n predicts target n.
        head_VH: [V, H], any float dtype.
        targets_N: [N] token ids.
        temperature: of the distribution.
        entropy_gradient: whether the entropy carries a gradient too (an entropy bonus); otherwise it is for the logs.
        accumulate_grads_inplace: the backward pass may add the head's gradient to its .grad by itself.
        dtypes: of the products forward and backward (`grpo.kernels.head.training_dtypes`); None: `product_dtype`.

    Returns:
        Logprobs [N] and entropies [N], both float32 in nats. The softmax is float32, products run in `product_dtype`.
    """
    dtype = product_dtype(hidden_NH.device)
    dtypes = dtypes or (dtype, dtype)
    return TokenLogprobs.apply(
        hidden_NH, head_VH, targets_N, temperature, entropy_gradient, dtypes, accumulate_grads_inplace
    )
