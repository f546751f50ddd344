"""Descriptions of decoder-only models: the tensors and constants that a fused path reads.

`grpo.models.families.describe` makes them from a model of transformers. Decoding and training read the same description. It
holds the live parameters, so it is made anew for each forward pass, and nothing in it is ever stale.
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
    """y = x weight^T + bias, and the adapter's share where there is one."""

    weight: Tensor
    """[outputs, inputs]"""
    bias: Tensor | None = None
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Layer:
    """One decoder layer of the Llama family.

    hidden += out(attention(rotate(norm_heads(query)), rotate(norm_heads(key)), value))    of norm(hidden)
    hidden += down(silu(gate) * up)                                                        of mlp_norm(hidden)
    """

    norm: Tensor
    """[hidden_size], of the RMSNorm before attention."""
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
    """[head_size]: an RMSNorm of each head before the rotation (Qwen3); None: no such norm."""
    key_norm: Tensor | None = None
    head_epsilon: float = 0.0
    window: int | None = None
    """Tokens that a query sees, itself included; None: all before it."""
    rotary: bool = True
    """False: a layer without rotary embedding (NoPE, arXiv 2305.19466)."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Query, key, value, out, gate, up, down."""
        return (self.query, self.key, self.value, self.out, self.gate, self.up, self.down)

    @property
    def norms(self) -> tuple[Tensor, ...]:
        """The norms' weights."""
        heads = () if self.query_norm is None or self.key_norm is None else (self.query_norm, self.key_norm)
        return (self.norm, self.mlp_norm, *heads)

    @property
    def has_adapter(self) -> bool:
        return any(linear.adapter is not None for linear in self.linears)


@dataclass(frozen=True)
class Model:
    """A decoder-only model without its output head: embedding, layers, norm."""

    embedding: Tensor
    """[vocabulary, hidden_size]"""
    padding_id: int | None
    """The token whose embedding gets no gradient."""
    layers: tuple[Layer, ...]
    norm: Tensor
    epsilon: float
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """hidden [B, T, hidden_size] (for dtype and device) and positions [B, T] -> cosines and sines [B, T, head_size]."""
    checkpointed: bool = False
    """Training keeps only the inputs of layers (gradient checkpointing)."""
