"""Decoding from a model's description: a few large operations per layer, on working weights in the dtype of the run.

One token costs a fraction of the modules' bookkeeping. The residual stream and the norms stay in float32, as they do when the
modules run under autocast. grpo/kernels/cpu/decode_step.py does a whole step in C.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.cpu import onednn
from grpo.kernels.description import Layer, Linear, Model
from grpo.kernels.head import head_logits, product_dtype
from grpo.kernels.kv_cache import SlotCache
from grpo.kernels.registry import is_on


@dataclass(frozen=True)
class Schedule:
    """How an engine drives decoding on a device."""

    check_every: int
    """Steps between two looks of the host at the sampled tokens. A finished row then samples a few tokens too many, which are
    dropped, but the device never waits."""
    captures_graphs: bool
    """Steps are replayed from CUDA graphs: memory is kept, and shapes are rounded up to few."""


def schedule_for(device: torch.device) -> Schedule:
    """The schedule for `device`."""
    return Schedule(1 if device.type == "cpu" else 16, device.type == "cuda" and is_on("cuda_graphs"))


def padded_rows(rows: int, device: torch.device) -> int:
    """Rows that are best computed for `rows` rows of plain modules."""
    return onednn.padded_rows(rows) if device.type == "cpu" else rows


class FusedDecoder:
    """Prefill and decoding steps in PyTorch, on every device.

    `refresh` copies the weights of a description; what it copied into stays where it is, since captured graphs read it.
    """

    def __init__(self) -> None:
        self.layers: list[WorkingLayer] = []
        self.dtype = torch.float32
        self.table: Tensor | None = None
        self.norm = self.embedding = torch.empty(0)
        self.head: Any = self.norm

    @staticmethod
    def is_supported(model: Model, dtype: torch.dtype) -> bool:
        """Return whether every layer is one that `step` computes, with products in `dtype`: those without a window."""
        return is_on("fused_decode") and all(layer.window is None for layer in model.layers)

    def refresh(self, model: Model, head: Tensor, dtype: torch.dtype) -> None:
        """Take over the weights of `model` and of the output head [V, H]; products are in `dtype`."""
        self.dtype, self.model = dtype, model
        self.layers = self.layers or [WorkingLayer() for _ in model.layers]
        for working, layer in zip(self.layers, model.layers, strict=True):
            working.refresh(layer, self)
        self.norm = _kept(self.norm, _norm_weight(model.norm), torch.float32)
        self.embedding = model.embedding.detach()
        self.head = self._head_weight(head.detach())

    def pack(self, weight: Tensor, before: Any) -> Any:
        """A weight of a layer in the layout of `product`, in the memory of `before` where that is possible."""
        if onednn.is_supported(weight.device, self.dtype):
            return onednn.packed(weight)
        return _kept(before, weight, self.dtype)

    def product(self, states: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """[B, I] and a packed [O, I] -> [B, O]."""
        return onednn.linear(states, weight, bias) if weight.is_mkldnn else F.linear(states, weight, bias)

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the cached keys and values where products are in `dtype`."""
        return dtype

    @property
    def bias_dtype(self) -> torch.dtype:
        return self.dtype

    def padded_rows(self, rows: int) -> int:
        """Rows that are best computed for `rows` rows."""
        return padded_rows(rows, self.embedding.device)

    def logits(self, hidden_BH: Tensor) -> Tensor:
        """hidden [B, H] -> float32 logits [B, V]"""
        if self.head.is_mkldnn:
            return self.product(hidden_BH.float(), self.head)
        return head_logits(hidden_BH, self.head, product_dtype(hidden_BH.device))

    def release(self) -> None:
        """Free what can be freed until the next refresh. On CUDA the working weights stay: captured graphs read them."""
        if self.embedding.device.type != "cuda":
            self.layers.clear()
            self.head = torch.empty(0)

    def prefill(self, ids: Tensor, cache: SlotCache) -> Tensor:
        """ids [prompts, tokens], right-padded -> hidden [prompts, tokens, H]; keys and values in cache.prompt."""
        prompts, tokens = ids.shape
        cache.prompt = []
        self._rotary(cache.length, ids.device)
        positions = torch.arange(tokens, device=ids.device).repeat(prompts)

        def attend(layer: "WorkingLayer", _: int, mixed: Tensor) -> Tensor:
            states = mixed.unflatten(0, (prompts, tokens)).transpose(1, 2)
            query, key, value = states.split((layer.heads, layer.key_heads, layer.key_heads), dim=1)
            cache.collect(key, value)
            key, value = (_repeat(tensor, layer.heads) for tensor in (key, value))
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=layer.scaling)
            return attended.transpose(1, 2).flatten(0, 1)

        return self._forward(ids.flatten(), positions, attend).unflatten(0, (prompts, tokens))

    def step(self, tokens_B: Tensor, positions_B: Tensor, cache: SlotCache) -> Tensor:
        """One new token for each active row -> hidden [B, H]. cache.aim was called before."""
        place = torch.arange(cache.longest, device=positions_B.device)
        unseen = (place > positions_B[:, None])[:, None, None]
        mask = torch.zeros(unseen.shape, dtype=self.dtype, device=unseen.device).masked_fill_(unseen, -torch.inf)

        def attend(layer: "WorkingLayer", index: int, mixed: Tensor) -> Tensor:
            keys, values = cache.write_joint(index, mixed[:, layer.heads :])
            # The query heads that share a key head stand in for a query length: no key or value is repeated.
            query = mixed[:, : layer.heads].unflatten(1, (layer.key_heads, -1))
            if query.is_cpu:
                return _attend_on_cpu(query, keys, values, mask, layer.scaling).flatten(1, 2)
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=layer.scaling)
            return attended.flatten(1, 2)

        return self._forward(tokens_B, positions_B, attend)

    def _forward(self, ids_T: Tensor, positions_T: Tensor, attend) -> Tensor:  # type: ignore[no-untyped-def]
        """ids [T] -> hidden [T, H]. attend(layer, its index, queries, keys and values [T, H + 2K, D]) -> [T, H, D]"""
        assert self.table is not None
        with torch.autocast(ids_T.device.type, enabled=False):
            rotation = self.table[positions_T][:, None]  # [T, 1, D / 2]
            hidden = F.embedding(ids_T, self.embedding).float()
            for index, layer in enumerate(self.layers):
                weights = layer.tensors
                normed = _norm(hidden, weights["norm"], layer.epsilon).to(self.dtype)
                mixed = self.product(normed, weights["qkv"], weights.get("qkv_bias")).float()
                mixed = mixed.unflatten(-1, (-1, layer.head_size))
                rotated = mixed[:, : layer.heads + layer.key_heads]  # values are not rotated
                if "head_norm" in weights:
                    rotated.copy_(_norm(rotated, weights["head_norm"], layer.head_epsilon))
                if layer.rotary:
                    torch.view_as_complex(rotated.unflatten(-1, (-1, 2))).mul_(rotation)
                attended = attend(layer, index, mixed.to(self.dtype)).flatten(1)
                hidden += self.product(attended, weights["out"], weights.get("out_bias"))
                normed = _norm(hidden, weights["mlp_norm"], layer.mlp_epsilon).to(self.dtype)
                gate, up = self.product(normed, weights["gate_up"], weights.get("gate_up_bias")).chunk(2, dim=-1)
                hidden += self.product(F.silu(gate).mul_(up), weights["down"], weights.get("down_bias"))
            return _norm(hidden, self.norm, self.model.epsilon)

    def _head_weight(self, head: Tensor) -> Any:
        dtype = product_dtype(head.device)  # float32 on a CPU, whatever the other products are in
        if onednn.is_supported(head.device, dtype):
            return onednn.packed(head)
        # Cast once here, not at every token.
        return head if dtype == head.dtype else _kept(self.head, head, dtype)

    def _rotary(self, length: int, device: torch.device) -> None:
        """Rotary embedding (arXiv 2104.09864) as complex numbers [length, D / 2], for every position."""
        if self.table is None or len(self.table) < length or self.table.device != device:
            positions = torch.arange(length, device=device)[None]
            with torch.autocast(device.type, enabled=False):
                cos, sin = self.model.rotary(torch.zeros(1, device=device), positions)
            self.table = torch.complex(*(part[0, :, : part.shape[-1] // 2].float() for part in (cos, sin)))


class WorkingLayer:
    """The working weights of one decoder layer: the products that read the same input are one."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}
        self.heads = self.key_heads = self.head_size = 0
        self.scaling = self.epsilon = self.mlp_epsilon = self.head_epsilon = 0.0
        self.rotary = True

    def refresh(self, layer: Layer, decoder: FusedDecoder) -> None:
        """Copy the weights of `layer`, adapters merged, as `decoder` packs them."""
        for name in ("heads", "key_heads", "head_size", "scaling", "epsilon", "mlp_epsilon", "head_epsilon", "rotary"):
            setattr(self, name, getattr(layer, name))
        size = layer.head_size
        parts = (layer.query, layer.key, layer.value)
        query, key, value = (merged(part) for part in parts)
        weights = {
            "qkv": torch.cat([_interleaved(query, size), _interleaved(key, size), value]),
            "out": merged(layer.out),
            "gate_up": torch.cat([merged(layer.gate), merged(layer.up)]),
            "down": merged(layer.down),
        }
        for name, weight in weights.items():
            self.tensors[name] = decoder.pack(weight, self.tensors.get(name))
        for name, tensor in self._vectors(layer).items():
            dtype = torch.float32 if name.endswith("norm") else decoder.bias_dtype
            tensor = _norm_weight(tensor) if name.endswith("norm") else tensor
            self.tensors[name] = _kept(self.tensors.get(name), tensor, dtype)

    def _vectors(self, layer: Layer) -> dict[str, Tensor]:
        """Norms and biases."""
        size, vectors = layer.head_size, {"norm": layer.norm.detach(), "mlp_norm": layer.mlp_norm.detach()}
        if layer.query_norm is not None and layer.key_norm is not None:
            norms = (_interleaved(norm.detach(), size) for norm in (layer.query_norm, layer.key_norm))
            counts = (layer.heads, layer.key_heads)
            vectors["head_norm"] = torch.cat([norm.expand(n, -1) for norm, n in zip(norms, counts, strict=True)])
        query, key, value, out, gate, up, down = (linear.bias for linear in layer.linears)
        if query is not None and key is not None and value is not None:
            vectors["qkv_bias"] = torch.cat([_interleaved(query, size), _interleaved(key, size), value]).detach()
        if gate is not None and up is not None:
            vectors["gate_up_bias"] = torch.cat([gate, up]).detach()
        return vectors | {
            f"{name}_bias": bias.detach() for name, bias in (("out", out), ("down", down)) if bias is not None
        }


def merged(linear: Linear) -> Tensor:
    """The weight, with the adapter's share added."""
    weight = linear.weight.detach()
    if linear.adapter is None:
        return weight
    return weight + (linear.adapter.scale * (linear.adapter.b.detach() @ linear.adapter.a.detach())).to(weight.dtype)


def _kept(before: Any, fresh: Tensor, dtype: torch.dtype) -> Tensor:
    """`fresh` in `dtype`, in the memory of last time where there is any: a captured graph keeps reading it."""
    if before is None or before.shape != fresh.shape or before.dtype != dtype or before.is_mkldnn:
        return fresh.to(dtype, copy=True)
    kept: Tensor = before.copy_(fresh)
    return kept


def _interleaved(rows: Tensor, head_size: int) -> Tensor:
    """Rows of each head in the order 0, D/2, 1, D/2 + 1, ...: the two that are rotated together lie side by side, as the real
    and the imaginary part of one number, so that it is one product. Dot products of queries and keys stay what they are."""
    return rows.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def _norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension, in float32; `weight` may have one row for each head."""
    if not hidden.is_cpu:
        fused = weight if weight.ndim == 1 else None
        normed = F.rms_norm(hidden, hidden.shape[-1:], fused, epsilon)
        return normed if fused is not None else normed * weight
    # On a CPU, F.rms_norm is eight small operations; this is the same in four, since
    # sqrt(|h|^2 / size + epsilon) = hypot(|h|, sqrt(size * epsilon)) / sqrt(size), whose last factor is in the weight.
    size = hidden.shape[-1]
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return (hidden / torch.hypot(length, _constant((size * epsilon) ** 0.5))).mul_(weight)


def _norm_weight(weight: Tensor) -> Tensor:
    """A norm's weight as `_norm` wants it."""
    weight = weight.detach()
    return weight.float() * weight.shape[-1] ** 0.5 if weight.is_cpu else weight


@functools.cache
def _constant(value: float) -> Tensor:
    return torch.tensor(value)


def _attend_on_cpu(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """query [B, K, S, D], keys and values [B, K, L, D], mask [B, 1, 1, L] -> [B, K, S, D]: two batched products, which beat
    the CPU's fused attention at a query length of a few."""
    rows, heads, shared, _ = query.shape
    scores = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).unflatten(0, (rows, heads))
    weights = scores.mul_(scaling).add_(mask).softmax(-1).flatten(0, 1)
    return torch.bmm(weights, values.flatten(0, 1)).unflatten(0, (rows, heads))


def _repeat(tensor: Tensor, heads: int) -> Tensor:
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)
