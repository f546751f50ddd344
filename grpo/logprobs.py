"""Token logprobs: hidden states -> log p(token) and entropy per token. Logits [N, V] never exist as a whole."""

import torch
from torch import Tensor

from grpo.kernels.head import IDENTITY, LogitTransform, TokenLogprobs, product_dtype


def token_logprobs(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    *,
    entropy_gradient: bool = False,
    accumulate_grads_inplace: bool = False,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
    bias_V: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
) -> tuple[Tensor, Tensor]:
    """Return log p(target) and the entropy of p = softmax(hidden @ head.T / temperature), for each token.

    Gradients flow to hidden states, head and bias through the logprobs.

    Args:
        hidden_NH: [N, H], any float dtype. Row n predicts target n.
        head_VH: [V, H], any float dtype.
        targets_N: [N] token ids.
        temperature: divides the logits.
        entropy_gradient: the entropies carry a gradient too, for an entropy bonus. Otherwise they are for logging
            only.
        accumulate_grads_inplace: the backward pass may add the head's gradient directly to its `.grad`.
        dtypes: dtypes of the products' inputs, forward and backward (`grpo.kernels.head.training_dtypes`). None:
            `product_dtype` for both.
        bias_V: [V], added to hidden @ head.T.
        transform: scale and softcap of the logits, before the temperature.

    Returns:
        Logprobs [N] and entropies [N], both float32, in nats. The softmax is float32.
    """
    dtype = product_dtype(hidden_NH.device)
    dtypes = dtypes or (dtype, dtype)
    return TokenLogprobs.apply(
        hidden_NH,
        head_VH,
        bias_V,
        targets_N,
        temperature,
        entropy_gradient,
        dtypes,
        accumulate_grads_inplace,
        transform,
    )
