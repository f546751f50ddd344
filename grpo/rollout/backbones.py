"""Backbones: token ids -> last hidden states, for decoding. Three of them; one is only used if it equals the first.

ModuleBackbone     the model's own modules, whatever they are, with our attention
FusedBackbone      the Llama family (Llama, Qwen2, Qwen3, Mistral, SmolLM, ...) as a few large products per layer, on
                   working weights in the dtype of the run. One token costs a fraction of the modules' bookkeeping.
CompiledBackbone   the same on a CPU in float32, one call per token into a small C program (grpo/rollout/compiled_backbone.py)
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from grpo.kernels.attention import SlotLayout
from grpo.logprobs import head_logits, product_dtype
from grpo.rollout.kv_cache import SlotCache


class Backbone(Protocol):
    model: PreTrainedModel

    def refresh(self) -> None:
        """Take over the weights that the model has now."""
        ...

    def prefill(self, ids: Tensor, cache: SlotCache) -> Tensor:
        """ids [prompts, tokens], right-padded -> hidden [prompts, tokens, H]; keys and values in cache.prompt."""
        ...

    def step(self, tokens_B: Tensor, positions_B: Tensor, cache: SlotCache) -> Tensor:
        """One new token for each active row -> hidden [B, H]. cache.aim was called before."""
        ...

    def padded_rows(self, rows: int) -> int:
        """As how many rows it is best to decode `rows` on a CPU."""
        ...

    def logits(self, hidden_BH: Tensor) -> Tensor:
        """hidden [B, H] -> float32 logits [B, V]"""
        ...

    def release(self) -> None:
        """Nothing will be decoded for a while: give back what memory can be given back."""
        ...


def rows_for_onednn(rows: int) -> int:
    """Up to 32 rows in steps of 4, more in steps of 16: oneDNN compiles a product, of half a megabyte, for every number of rows
    that it meets, and keeps it."""
    step = 4 if rows <= 32 else 16
    return -(-rows // step) * step


class ModuleBackbone:
    """Through model.forward, on the live weights."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def refresh(self) -> None:
        pass

    def prefill(self, ids: Tensor, cache: SlotCache) -> Tensor:
        cache.prefilling, cache.prompt = True, []
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hidden = self._forward(ids, positions, cache, None)
        cache.prefilling = False
        return hidden

    def step(self, tokens_B: Tensor, positions_B: Tensor, cache: SlotCache) -> Tensor:
        layout = SlotLayout(positions_B + 1, cache.longest)
        return self._forward(tokens_B[:, None], positions_B[:, None], cache, layout)[:, 0]

    def padded_rows(self, rows: int) -> int:
        return rows_for_onednn(rows)

    def logits(self, hidden_BH: Tensor) -> Tensor:
        head = full_tensor(self.model.get_output_embeddings().weight)
        return head_logits(hidden_BH, head, product_dtype(hidden_BH.device))

    def release(self) -> None:
        pass

    def _forward(self, ids: Tensor, positions: Tensor, cache: SlotCache, layout: SlotLayout | None) -> Tensor:
        return self.model.base_model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, layout=layout
        ).last_hidden_state


class _Layer:
    """The working weights of one decoder layer: the three products that read the same input are one."""

    def __init__(self, layer: Any):
        self.source = layer
        attention = layer.self_attn
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.heads, self.key_heads = (p.out_features // self.head_dim for p in self.projections[:2])
        self.tensors: dict[str, Any] = {}

    def refresh(self, dtype: torch.dtype, pack: Callable[[Tensor], Any] | None) -> None:
        """Copy into the tensors of the last time, where there are any: a captured graph keeps reading them. `pack` lays out
        a weight for products."""
        attention, mlp, size = self.source.self_attn, self.source.mlp, self.head_dim
        query, key, value = (full_tensor(p.weight) for p in self.projections)
        fresh = {
            "qkv": torch.cat([_interleaved(query, size), _interleaved(key, size), value]),
            "out": full_tensor(attention.o_proj.weight),
            "gate_up": torch.cat([full_tensor(mlp.gate_proj.weight), full_tensor(mlp.up_proj.weight)]),
            "down": full_tensor(mlp.down_proj.weight),
        }
        if self.projections[0].bias is not None:
            query, key, value = (full_tensor(p.bias) for p in self.projections)
            fresh["qkv_bias"] = torch.cat([_interleaved(query, size), _interleaved(key, size), value])
        if getattr(attention, "q_norm", None) is not None:
            norms = (_interleaved(full_tensor(norm.weight), size) for norm in (attention.q_norm, attention.k_norm))
            per_head = [norm.expand(count, -1) for norm, count in zip(norms, (self.heads, self.key_heads), strict=True)]
            fresh["head_norm"] = torch.cat(per_head)
        fresh["norm"] = full_tensor(self.source.input_layernorm.weight)
        fresh["mlp_norm"] = full_tensor(self.source.post_attention_layernorm.weight)
        for name, tensor in fresh.items():
            wanted = dtype
            if name.endswith("norm"):
                wanted, tensor = torch.float32, _norm_weight(tensor)
            if pack is not None and name in ("qkv", "out", "gate_up", "down"):
                self.tensors[name] = pack(tensor)
            elif name in self.tensors and self.tensors[name].dtype == wanted:
                self.tensors[name].copy_(tensor)
            else:
                self.tensors[name] = tensor.to(wanted, copy=True)


class FusedBackbone:
    """h += attention(norm(h)); h += mlp(norm(h)), layer by layer. The residual stream and the norms stay in float32, as
    they do when the modules run under autocast; products run in the dtype of the run."""

    TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
    ROPE_TYPES = ("default", "linear", "llama3", "yarn")
    """Those whose frequencies do not depend on the length seen so far."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.base = cast(Any, model.base_model)  # its submodules are read by name
        self.layers = [_Layer(layer) for layer in self.base.layers]
        self.table: Tensor | None = None
        self.dtype = torch.float32
        self.norm = torch.empty(0)
        self.head: Any = self.norm

    @classmethod
    def fits(cls, model: PreTrainedModel) -> bool:
        """Whether the model has this shape. Whether it also has these values is for the engine's probe to say."""
        config = model.config
        rope = getattr(config, "rope_parameters", None) or {}
        windows = getattr(config, "layer_types", None) or ["full_attention"]
        layers: Any = getattr(model.base_model, "layers", [None])
        biased = [
            layer
            for layer in layers
            if layer is None or layer.self_attn.o_proj.bias is not None or layer.mlp.down_proj.bias is not None
        ]
        return (
            config.model_type in cls.TYPES
            and rope.get("rope_type", "default") in cls.ROPE_TYPES
            and set(windows) == {"full_attention"}
            and (config.model_type != "mistral" or config.sliding_window is None)
            and getattr(config, "hidden_act", None) == "silu"
            and not getattr(config, "no_rope_layers", None)
            and not biased
        )

    def refresh(self) -> None:
        device = self.model.device
        autocast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
        pack = self.packing(self.dtype)
        for layer in self.layers:
            layer.refresh(self.dtype, pack)
        self.norm = self._kept(self.norm, _norm_weight(full_tensor(self.base.norm.weight)), torch.float32)
        head, dtype = full_tensor(self.model.get_output_embeddings().weight), product_dtype(device)
        pack = self.packing(dtype)  # the head's product is float32 on a CPU, whatever the others are
        if pack is not None:
            self.head = pack(head)
        elif dtype == head.dtype:
            self.head = head
        else:  # cast once here, not at every token
            self.head = self._kept(self.head, head, dtype)

    def packing(self, dtype: torch.dtype) -> Callable[[Tensor], Any] | None:
        """What lays out the weights for products, where that is worth it: on a CPU, where a product of a dozen rows with a
        weight in its plain layout takes up to four times as long as with one that oneDNN has laid out for itself."""
        if self.model.device.type != "cpu" or dtype != torch.float32:
            return None
        reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
        return None if reorder is None else lambda weight: reorder(weight.float().contiguous())

    def product(self, states: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """[B, I] and [O, I] -> [B, O]."""
        if weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return F.linear(states, weight, bias)

    @staticmethod
    def _kept(before: Tensor, fresh: Tensor, dtype: torch.dtype) -> Tensor:
        """`fresh` in `dtype`, in the memory of last time where there is any: a captured graph keeps reading it."""
        if before.shape != fresh.shape or before.dtype != dtype:
            return fresh.to(dtype, copy=True)
        return before.copy_(fresh)

    def padded_rows(self, rows: int) -> int:
        return rows_for_onednn(rows)

    def logits(self, hidden_BH: Tensor) -> Tensor:
        dtype = product_dtype(hidden_BH.device)
        if self.packing(dtype) is not None:
            return self.product(hidden_BH.float(), self.head)
        return head_logits(hidden_BH, self.head, dtype)

    def release(self) -> None:
        """On CUDA the working weights stay: captured graphs read them."""
        if self.model.device.type != "cuda":
            for layer in self.layers:
                layer.tensors.clear()
            self.head = torch.empty(0)

    def prefill(self, ids: Tensor, cache: SlotCache) -> Tensor:
        prompts, tokens = ids.shape
        cache.prompt = []
        self._rotary(cache.length)
        positions = torch.arange(tokens, device=ids.device).repeat(prompts)

        def attend(layer: _Layer, _: int, mixed: Tensor) -> Tensor:
            states = mixed.unflatten(0, (prompts, tokens)).transpose(1, 2)
            query, key, value = states.split((layer.heads, layer.key_heads, layer.key_heads), dim=1)
            cache.collect(key, value)
            key, value = (_repeat(tensor, layer.heads) for tensor in (key, value))
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=layer.scaling)
            return attended.transpose(1, 2).flatten(0, 1)

        return self._forward(ids.flatten(), positions, attend).unflatten(0, (prompts, tokens))

    def step(self, tokens_B: Tensor, positions_B: Tensor, cache: SlotCache) -> Tensor:
        place = torch.arange(cache.longest, device=positions_B.device)
        unseen = (place > positions_B[:, None])[:, None, None]
        mask = torch.zeros(unseen.shape, dtype=self.dtype, device=unseen.device).masked_fill_(unseen, -torch.inf)

        def attend(layer: _Layer, index: int, mixed: Tensor) -> Tensor:
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
        epsilon: float = self.base.norm.variance_epsilon
        with torch.autocast(ids_T.device.type, enabled=False):
            turn = self.table[positions_T][:, None]  # [T, 1, D / 2]
            hidden = F.embedding(ids_T, full_tensor(self.base.get_input_embeddings().weight)).float()
            for index, layer in enumerate(self.layers):
                weights = layer.tensors
                normed = _norm(hidden, weights["norm"], epsilon).to(self.dtype)
                mixed = self.product(normed, weights["qkv"], weights.get("qkv_bias")).float()
                mixed = mixed.unflatten(-1, (-1, layer.head_dim))
                turned = mixed[:, : layer.heads + layer.key_heads]  # values are not turned
                if "head_norm" in weights:
                    turned.copy_(_norm(turned, weights["head_norm"], epsilon))
                torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(turn)
                attended = attend(layer, index, mixed.to(self.dtype)).flatten(1)
                hidden += self.product(attended, weights["out"])
                normed = _norm(hidden, weights["mlp_norm"], epsilon).to(self.dtype)
                gate, up = self.product(normed, weights["gate_up"]).chunk(2, dim=-1)
                hidden += self.product(F.silu(gate).mul_(up), weights["down"])
            return _norm(hidden, self.norm, epsilon)

    def _rotary(self, length: int) -> None:
        """RoPE (arXiv 2104.09864) as complex numbers [length, D / 2], for every position, from the model's own module."""
        if self.table is None or len(self.table) < length or self.table.device != self.model.device:
            positions = torch.arange(length, device=self.model.device)[None]
            with torch.autocast(self.model.device.type, enabled=False):
                cos, sin = self.base.rotary_emb(torch.zeros(1, device=self.model.device), positions)
            self.table = torch.complex(*(part[0, :, : part.shape[-1] // 2].float() for part in (cos, sin)))


def _interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of each head in the order 0, D/2, 1, D/2 + 1, ...: the two that RoPE turns together lie side by side, as the real
    and the imaginary part of one number, so that it is one product. Dot products of queries and keys stay what they are."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


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


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole of a parameter that FSDP2 may hold in shards."""
    whole = getattr(parameter.detach(), "full_tensor", None)
    return whole() if whole is not None else parameter.detach()
