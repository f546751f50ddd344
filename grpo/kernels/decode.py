"""Decoding from a model's description: a few large operations per layer, on copies of the weights in the dtype of the
run.

This avoids most of the overhead of the modules at each token. The residual stream and the norms stay in float32, as in
the modules under autocast. grpo/kernels/cpu/decode_step.py computes a whole step in C.
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
    """Settings of the decode loop for a device."""

    check_every: int
    """Steps between two reads of the sampled tokens by the host. A finished row samples a few extra tokens, which
    are dropped, but the device never waits."""
    captures_graphs: bool
    """Replay steps from CUDA graphs. Memory is then kept between calls, and shapes are rounded up to few values."""


def schedule_for(device: torch.device) -> Schedule:
    """Return the schedule for `device`."""
    return Schedule(1 if device.type == "cpu" else 16, device.type == "cuda" and is_on("cuda_graphs"))


def decoding_dtype(model: Model, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a decoder's products, where `dtype` is that of autocast.

    float32 for layers with adapters on a CPU: the sum of weight and adapter has more digits than 16 bits hold.
    """
    return torch.float32 if model.embedding.is_cpu and any(layer.has_adapter for layer in model.layers) else dtype


def padded_rows(rows: int, device: torch.device) -> int:
    """Return the number of rows to compute for `rows` rows in a model's modules."""
    return onednn.padded_rows(rows) if device.type == "cpu" else rows


class FusedDecoder:
    """Prefill and decoding steps in PyTorch, on every device.

    `refresh` copies the weights of a description. Where possible it reuses the memory of the last copy, which captured
    graphs read.
    """

    def __init__(self) -> None:
        self.layers: list[WorkingLayer] = []
        self.dtype = torch.float32
        self.keeps_adapters = False
        """Adapters stay beside their weights. Merged into a 16-bit weight, a small change of them is rounded away."""
        self.table: Tensor | None = None
        self.norm = self.embedding = torch.empty(0)
        self.head: Any = self.norm

    @staticmethod
    def is_supported(model: Model, dtype: torch.dtype) -> bool:
        """Return whether `step` can compute every layer with products in `dtype`: no layer may have a window."""
        return is_on("fused_decode") and all(layer.window is None for layer in model.layers)

    def refresh(self, model: Model, head: Tensor, dtype: torch.dtype) -> None:
        """Copy the weights of a model.

        Args:
            model: description of the model.
            head: [V, H], weight of the output head.
            dtype: dtype of the products.
        """
        self.dtype, self.model = dtype, model
        self.keeps_adapters = dtype != torch.float32 and any(layer.has_adapter for layer in model.layers)
        self.layers = self.layers or [WorkingLayer() for _ in model.layers]
        for working, layer in zip(self.layers, model.layers, strict=True):
            working.refresh(layer, self)
        self.norm = _kept(self.norm, _norm_weight(model.norm), torch.float32)
        self.embedding = model.embedding.detach()
        self.head = self._head_weight(head.detach())

    def pack(self, weight: Tensor, before: Any) -> Any:
        """Return a layer's weight in the layout that `product` reads, in the memory of `before` where possible."""
        if onednn.is_supported(weight.device, self.dtype):
            return onednn.packed(weight)
        return _kept(before, weight, self.dtype)

    def product(self, states: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Multiply states [B, I] by a packed weight [O, I] -> [B, O]."""
        return onednn.linear(states, weight, bias) if weight.is_mkldnn else F.linear(states, weight, bias)

    def linear(self, states: Tensor, weights: dict[str, Any], name: str) -> Tensor:
        """Multiply states [B, I] by the packed weight `name`, [O, I], add its bias, and its adapter if it is kept.

        The sum with an adapter is float32: rounded to 16 bits, the weight's part would swallow the adapter's.
        """
        bias, low = weights.get(f"{name}_bias"), weights.get(f"{name}_low") if self.keeps_adapters else None
        if low is None:
            return self.product(states, weights[name], bias)
        total = wide_product(states, weights[name])
        if bias is not None:
            total += bias
        return add_wide_product(total, F.linear(states, low), weights[f"{name}_high"])

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of cached keys and values if products are in `dtype`."""
        return dtype

    @property
    def bias_dtype(self) -> torch.dtype:
        """Dtype of biases."""
        return self.dtype

    def padded_rows(self, rows: int) -> int:
        """Return the number of rows to compute for `rows` rows."""
        return padded_rows(rows, self.embedding.device)

    def logits(self, hidden_BH: Tensor) -> Tensor:
        """Return the logits [B, V], float32, of hidden states [B, H]."""
        if self.head.is_mkldnn:
            return self.product(hidden_BH.float(), self.head)
        return head_logits(hidden_BH, self.head, product_dtype(hidden_BH.device))

    def release(self) -> None:
        """Free the copied weights until the next refresh. No captured graph may read them any more."""
        self.layers.clear()
        self.head = torch.empty(0)

    def prefill(self, ids: Tensor, cache: SlotCache) -> Tensor:
        """Compute prompts and keep their keys and values in cache.prompt.

        Args:
            ids: [prompts, tokens], right-padded.
            cache: receives the keys and values.

        Returns:
            Hidden states [prompts, tokens, H].
        """
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
        """Compute one new token for each active row. Call `cache.aim` first.

        Args:
            tokens_B: [B] token ids.
            positions_B: [B] their positions.
            cache: receives the keys and values of the new tokens.

        Returns:
            Hidden states [B, H].
        """
        place = torch.arange(cache.longest, device=positions_B.device)
        unseen = (place > positions_B[:, None])[:, None, None]
        mask = torch.zeros(unseen.shape, dtype=self.dtype, device=unseen.device).masked_fill_(unseen, -torch.inf)

        def attend(layer: "WorkingLayer", index: int, mixed: Tensor) -> Tensor:
            keys, values = cache.write_joint(index, mixed[:, layer.heads :])
            # The query heads that share a key head take the place of query tokens, so no key or value is repeated.
            query = mixed[:, : layer.heads].unflatten(1, (layer.key_heads, -1))
            if query.is_cpu:
                return _attend_on_cpu(query, keys, values, mask, layer.scaling).flatten(1, 2)
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=layer.scaling)
            return attended.flatten(1, 2)

        return self._forward(tokens_B, positions_B, attend)

    def _forward(self, ids_T: Tensor, positions_T: Tensor, attend) -> Tensor:  # type: ignore[no-untyped-def]
        """Run all layers and the final norm: ids [T] -> hidden [T, H].

        `attend(layer, index, mixed)` maps queries, keys and values [T, H + 2 K, D] of a layer to attended states [T,
        H, D].
        """
        assert self.table is not None
        with torch.autocast(ids_T.device.type, enabled=False):
            rotation = self.table[positions_T][:, None]  # [T, 1, D / 2]
            hidden = F.embedding(ids_T, self.embedding).float()
            for index, layer in enumerate(self.layers):
                weights = layer.tensors
                normed = _norm(hidden, weights["norm"], layer.epsilon).to(self.dtype)
                mixed = self.linear(normed, weights, "qkv").float()
                mixed = mixed.unflatten(-1, (-1, layer.head_size))
                rotated = mixed[:, : layer.heads + layer.key_heads]  # values are not rotated
                if "head_norm" in weights:
                    rotated.copy_(_norm(rotated, weights["head_norm"], layer.head_epsilon))
                if layer.rotary:
                    torch.view_as_complex(rotated.unflatten(-1, (-1, 2))).mul_(rotation)
                attended = attend(layer, index, mixed.to(self.dtype)).flatten(1)
                hidden += self.linear(attended, weights, "out")
                normed = _norm(hidden, weights["mlp_norm"], layer.mlp_epsilon).to(self.dtype)
                gate, up = self.linear(normed, weights, "gate_up").chunk(2, dim=-1)
                hidden += self.linear(F.silu(gate).mul_(up).to(self.dtype), weights, "down")
            return _norm(hidden, self.norm, self.model.epsilon)

    def _head_weight(self, head: Tensor) -> Any:
        """Return the head in the layout and dtype that `logits` reads."""
        dtype = product_dtype(head.device)  # float32 on a CPU, for any dtype of the other products
        if onednn.is_supported(head.device, dtype):
            return onednn.packed(head)
        # Cast once here instead of at every token.
        return head if dtype == head.dtype else _kept(self.head, head, dtype)

    def _rotary(self, length: int, device: torch.device) -> None:
        """Compute the rotary embedding (arXiv 2104.09864) of every position as complex numbers [length, D / 2]."""
        if self.table is None or len(self.table) < length or self.table.device != device:
            positions = torch.arange(length, device=device)[None]
            with torch.autocast(device.type, enabled=False):
                cos, sin = self.model.rotary(torch.zeros(1, device=device), positions)
            self.table = torch.complex(*(part[0, :, : part.shape[-1] // 2].float() for part in (cos, sin)))


class WorkingLayer:
    """Copied weights of one decoder layer. Weights that multiply the same input are joined."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}
        self.heads = self.key_heads = self.head_size = 0
        self.scaling = self.epsilon = self.mlp_epsilon = self.head_epsilon = 0.0
        self.rotary = True

    def refresh(self, layer: Layer, decoder: FusedDecoder) -> None:
        """Copy the weights of `layer` in the layout of `decoder`, with adapters merged unless it keeps them."""
        for name in ("heads", "key_heads", "head_size", "scaling", "epsilon", "mlp_epsilon", "head_epsilon", "rotary"):
            setattr(self, name, getattr(layer, name))
        size = layer.head_size
        query, key, value, out, gate, up, down = (
            part.weight.detach() if decoder.keeps_adapters else merged(part) for part in layer.linears
        )
        weights = {
            "qkv": torch.cat([_interleaved(query, size), _interleaved(key, size), value]),
            "out": out,
            "gate_up": torch.cat([gate, up]),
            "down": down,
        }
        for name, weight in weights.items():
            self.tensors[name] = decoder.pack(weight, self.tensors.get(name))
        if decoder.keeps_adapters:
            for name, tensor in self._adapters(layer).items():
                self.tensors[name] = _kept(self.tensors.get(name), tensor, decoder.dtype)
        for name, tensor in self._vectors(layer).items():
            dtype = torch.float32 if name.endswith("norm") else decoder.bias_dtype
            tensor = _norm_weight(tensor) if name.endswith("norm") else tensor
            self.tensors[name] = _kept(self.tensors.get(name), tensor, dtype)

    def _adapters(self, layer: Layer) -> dict[str, Tensor]:
        """Return the adapters of the joined weights by name: `_low` [r, I] and `_high` [O, r], with r of all parts."""
        joined = {
            "qkv": (layer.query, layer.key, layer.value),
            "out": (layer.out,),
            "gate_up": (layer.gate, layer.up),
            "down": (layer.down,),
        }
        found: dict[str, Tensor] = {}
        for name, parts in joined.items():
            adapters = [part.adapter for part in parts]
            if not any(adapters):
                continue
            high = [
                part.weight.new_zeros(len(part.weight), 0, dtype=torch.float32)
                if adapter is None
                else adapter.scale * adapter.b.detach().float()
                for part, adapter in zip(parts, adapters, strict=True)
            ]
            if name == "qkv":  # rows in the order of the weight's
                high[:2] = (_interleaved(rows, layer.head_size) for rows in high[:2])
            found[f"{name}_high"] = torch.block_diag(*high)
            found[f"{name}_low"] = torch.cat([adapter.a.detach() for adapter in adapters if adapter is not None])
        return found

    def _vectors(self, layer: Layer) -> dict[str, Tensor]:
        """Return the norms and biases by name."""
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
    """Return the weight of a linear layer with its adapter merged."""
    weight = linear.weight.detach()
    if linear.adapter is None:
        return weight
    return weight.float() + linear.adapter.scale * (
        linear.adapter.b.detach().float() @ linear.adapter.a.detach().float()
    )


def wide_product(states: Tensor, weight: Tensor) -> Tensor:
    """Multiply 16-bit states [B, I] by a 16-bit weight [O, I] -> [B, O] float32."""
    if states.is_cuda:
        return torch.mm(states, weight.T, out_dtype=torch.float32)
    return F.linear(states.float(), weight.float())


def add_wide_product(total: Tensor, states: Tensor, weight: Tensor) -> Tensor:
    """Return `total`, [B, O] float32, plus the product of 16-bit states [B, I] and a 16-bit weight [O, I]."""
    if states.is_cuda:
        return torch.addmm(total, states, weight.T, out_dtype=torch.float32)
    return total.addmm_(states.float(), weight.float().T)


def _kept(before: Any, fresh: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `fresh` in `dtype`, copied into the memory of `before` if that fits, since captured graphs read it."""
    if before is None or before.shape != fresh.shape or before.dtype != dtype or before.is_mkldnn:
        return fresh.to(dtype, copy=True)
    kept: Tensor = before.copy_(fresh)
    return kept


def _interleaved(rows: Tensor, head_size: int) -> Tensor:
    """Reorder the rows of each head to 0, D/2, 1, D/2 + 1, ...

    The two dimensions that are rotated together become the real and imaginary part of one complex number, so that the
    rotation is one complex product. Dot products of queries and keys do not change.
    """
    return rows.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def _norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension, in float32. `weight` may have one row per head."""
    if not hidden.is_cpu:
        fused = weight if weight.ndim == 1 else None
        normed = F.rms_norm(hidden, hidden.shape[-1:], fused, epsilon)
        return normed if fused is not None else normed * weight
    # On a CPU, F.rms_norm is eight small operations. This is the same in four:
    # sqrt(|h|^2 / size + epsilon) = hypot(|h|, sqrt(size * epsilon)) / sqrt(size). `_norm_weight` has the last factor.
    size = hidden.shape[-1]
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return (hidden / torch.hypot(length, _constant((size * epsilon) ** 0.5))).mul_(weight)


def _norm_weight(weight: Tensor) -> Tensor:
    """Return a norm's weight as `_norm` reads it: on a CPU, float32 times sqrt(size)."""
    weight = weight.detach()
    return weight.float() * weight.shape[-1] ** 0.5 if weight.is_cpu else weight


@functools.cache
def _constant(value: float) -> Tensor:
    return torch.tensor(value)


def _attend_on_cpu(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention by two batched products, which are faster than the CPU's fused attention for a few queries.

    Args:
        query: [B, K, S, D], where S query heads share a key head.
        keys: [B, K, L, D].
        values: [B, K, L, D].
        mask: [B, 1, 1, L], added to the scores.
        scaling: factor of the scores.

    Returns:
        [B, K, S, D]
    """
    rows, heads, shared, _ = query.shape
    scores = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).unflatten(0, (rows, heads))
    weights = scores.mul_(scaling).add_(mask).softmax(-1).flatten(0, 1)
    return torch.bmm(weights, values.flatten(0, 1)).unflatten(0, (rows, heads))


def _repeat(tensor: Tensor, heads: int) -> Tensor:
    """Repeat the K key heads of [B, K, T, D] to `heads` heads."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)
