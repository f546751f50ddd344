"""Reference: a decoder layer in plain operations of PyTorch, with autograd's own gradients.

The self-test (grpo/kernels/self_test.py) judges every other path by it, so it uses none of the kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.description import Layer, Linear


def decoder_layer(layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
    """Hidden states after one layer.

    Args:
        layer: its description.
        hidden: [T, hidden_size].
        cos: [T, head_size], as `sin`.
        visible: [T, T] bool: whether the token of the row sees that of the column. The layer's window is applied here.

    Returns:
        [T, hidden_size]
    """
    normed = rms_norm(hidden, layer.norm, layer.epsilon)
    query, key, value = (
        linear(normed, part).unflatten(-1, (-1, layer.head_size)) for part in (layer.query, layer.key, layer.value)
    )
    if layer.query_norm is not None and layer.key_norm is not None:
        query = rms_norm(query, layer.query_norm, layer.head_epsilon)
        key = rms_norm(key, layer.key_norm, layer.head_epsilon)
    if layer.rotary:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    shared = layer.heads // layer.key_heads
    key, value = (states.repeat_interleave(shared, dim=1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * layer.scaling
    attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value)
    middle = hidden + linear(attended.flatten(1), layer.out)
    normed = rms_norm(middle, layer.mlp_norm, layer.mlp_epsilon)
    return middle + linear(F.silu(linear(normed, layer.gate)) * linear(normed, layer.up), layer.down)


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * hidden / rms(hidden), over the last dimension."""
    return weight * (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon))


def linear(states: Tensor, part: Linear) -> Tensor:
    """[T, inputs] -> [T, outputs], with the adapter's share."""
    result = states @ part.weight.T
    if part.bias is not None:
        result = result + part.bias
    if part.adapter is not None:
        result = result + part.adapter.scale * (states @ part.adapter.a.T @ part.adapter.b.T)
    return result


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, D]: dimensions i and i + D / 2 are a pair."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
