"""Descriptions of decoder-only models: the tensors and constants that kernels read instead of calling modules.

`grpo.models.families.describe` builds one from a transformers model. Training and decoding read the same description.
It holds the live parameters and is rebuilt for each forward pass, so it cannot be stale.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Adapter:
    """Low-rank adapter (LoRA, arXiv 2106.09685): y += scale * (x a^T) b^T."""

    a: Tensor
    """[r, inputs]"""
    b: Tensor
    """[outputs, r]"""
    scale: float


@dataclass(frozen=True)
class Linear:
    """Linear layer: y = x weight^T + bias, plus the adapter's term if there is one."""

    weight: Tensor
    """[outputs, inputs]"""
    bias: Tensor | None = None
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Layer:
    """One decoder layer of the Llama family.

    x = norm(hidden)        hidden += out(attention(rotate(norm_heads(query(x))), rotate(norm_heads(key(x))),
    value(x)))
    x = mlp_norm(hidden)    hidden += down(silu(gate(x)) * up(x))
    """

    norm: Tensor
    """[hidden_size], weight of the RMSNorm before attention."""
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    mlp_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear
    epsilon: float
    mlp_epsilon: float
    heads: int
    key_heads: int
    head_size: int
    scaling: float
    query_norm: Tensor | None = None
    """[head_size], weight of an RMSNorm of each head before the rotation (Qwen3). None: no such norm."""
    key_norm: Tensor | None = None
    head_epsilon: float = 0.0
    window: int | None = None
    """Number of tokens that a query attends to, itself included. None: all tokens before it."""
    rotary: bool = True
    """False for a layer without rotary embedding (NoPE, arXiv 2305.19466)."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Query, key, value, out, gate, up and down, in this order."""
        return (self.query, self.key, self.value, self.out, self.gate, self.up, self.down)

    @property
    def norms(self) -> tuple[Tensor, ...]:
        """Weights of the norms. Those of the heads come last, if there are any."""
        heads = () if self.query_norm is None or self.key_norm is None else (self.query_norm, self.key_norm)
        return (self.norm, self.mlp_norm, *heads)

    @property
    def has_adapter(self) -> bool:
        """Return whether any linear layer has an adapter."""
        return any(linear.adapter is not None for linear in self.linears)


@dataclass(frozen=True)
class Model:
    """A decoder-only model without its output head: embedding, layers and final norm."""

    embedding: Tensor
    """[vocabulary, hidden_size]"""
    padding_id: int | None
    """Token whose embedding gets no gradient."""
    layers: tuple[Layer, ...]
    norm: Tensor
    epsilon: float
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Map hidden [B, T, hidden_size], read for its dtype and device, and positions [B, T] to cosines and sines [B,
    T, head_size]."""
    checkpointed: bool = False
    """Gradient checkpointing: training keeps only the inputs of layers."""
