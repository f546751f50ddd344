"""Reference: a decoder layer and a recurrence in plain PyTorch operations, with the gradients of autograd.

The self-test (grpo/kernels/self_test.py) compares other paths with it, so it uses none of the kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.description import Layer, Linear


def decoder_layer(layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
    """Return the hidden states after one decoder layer.

    Args:
        layer: description of the layer.
        hidden: [T, hidden_size].
        cos: [T, head_size], cosines of the rotary embedding at each token's position.
        sin: [T, head_size], likewise.
        visible: [T, T] bool, True where the token of the row attends to the token of the column. The layer's window
            must already be applied.

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
    """RMSNorm over the last dimension: weight * hidden / rms(hidden)."""
    return weight * (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon))


def linear(states: Tensor, part: Linear) -> Tensor:
    """Linear layer [T, inputs] -> [T, outputs], with the adapter's term."""
    result = states @ part.weight.T
    if part.bias is not None:
        result = result + part.bias
    if part.adapter is not None:
        result = result + part.adapter.scale * (states @ part.adapter.a.T @ part.adapter.b.T)
    return result


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of states [T, heads, D]. Dimensions i and i + D / 2 form a pair."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def recurrence(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, rate: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence of grpo/kernels/recurrent.py for one head, token by token.

    Args:
        query: [T, N].
        key: [T, N].
        value: [T, D].
        log_decay: [T].
        rate: [T], of the delta rule. None: a state space.
        state: [N, D].

    Returns:
        Outputs [T, D] and the final state.
    """
    outputs = []
    for token in range(len(query)):
        state = log_decay[token].exp() * state
        update = value[token]
        if rate is not None:
            update = rate[token] * (update - key[token] @ state)
        state = state + torch.outer(key[token], update)
        outputs.append(query[token] @ state)
    return torch.stack(outputs), state
