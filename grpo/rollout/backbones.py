"""Backbones: token ids -> last hidden states, for decoding. Two of them, and the second is only used if it equals the first.

ModuleBackbone   the model's own modules, whatever they are, with our attention
FusedBackbone    the Llama family (Llama, Qwen2, Qwen3, Mistral, SmolLM, ...) as a few large products per layer, on
                 working weights in the dtype of the run. One token costs a fraction of the modules' bookkeeping.
"""

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from grpo.attention import SlotLayout
from grpo.logprobs import head_logits, product_dtype
from grpo.rollout.kv_cache import SlotCache


class Backbone(Protocol):
    def refresh(self) -> None:
        """Take over the weights that the model has now."""
        ...

    def prefill(self, ids: Tensor, cache: SlotCache) -> Tensor:
        """ids [prompts, tokens], right-padded -> hidden [prompts, tokens, H]; keys and values in cache.prompt."""
        ...

    def step(self, tokens_B: Tensor, positions_B: Tensor, cache: SlotCache) -> Tensor:
        """One new token for each active row -> hidden [B, H]. cache.aim was called before."""
        ...

    def logits(self, hidden_BH: Tensor) -> Tensor:
        """hidden [B, H] -> float32 logits [B, V]"""
        ...

    def release(self) -> None:
        """Nothing will be decoded for a while: give back what memory can be given back."""
        ...


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
        self.heads = [projection.out_features // self.head_dim for projection in self.projections]
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self.head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.tensors: dict[str, Tensor] = {}

    def refresh(self, dtype: torch.dtype) -> None:
        """Copy into the tensors of the last time, where there are any: a captured graph keeps reading them."""
        attention, mlp = self.source.self_attn, self.source.mlp
        fresh = {
            "qkv": torch.cat([full_tensor(p.weight) for p in self.projections]),
            "out": full_tensor(attention.o_proj.weight),
            "gate_up": torch.cat([full_tensor(mlp.gate_proj.weight), full_tensor(mlp.up_proj.weight)]),
            "down": full_tensor(mlp.down_proj.weight),
        }
        if self.projections[0].bias is not None:
            fresh["qkv_bias"] = torch.cat([full_tensor(p.bias) for p in self.projections])
        for name, tensor in fresh.items():
            if _packs(tensor, dtype) and tensor.ndim == 2:
                self.tensors[name] = _packed(tensor)
            elif name in self.tensors and self.tensors[name].dtype == dtype:
                self.tensors[name].copy_(tensor)
            else:
                self.tensors[name] = tensor.to(dtype, copy=True)


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
        self.table: tuple[Tensor, Tensor] | None = None
        self.dtype = torch.float32
        self.head = torch.empty(0)

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
        device = self.model.device.type
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        for layer in self.layers:
            layer.refresh(self.dtype)
        head = full_tensor(self.model.get_output_embeddings().weight)
        self.head = _packed(head) if _packs(head, torch.float32) else head

    def logits(self, hidden_BH: Tensor) -> Tensor:
        if self.head.is_mkldnn:
            return _product(hidden_BH.float(), self.head)
        return head_logits(hidden_BH, self.head, product_dtype(hidden_BH.device))

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

        def attend(_: int, scaling: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (
                tensor.unflatten(0, (prompts, tokens)).transpose(1, 2) for tensor in (query, key, value)
            )
            cache.collect(key, value)
            key, value = (_repeat(tensor, query.shape[1]) for tensor in (key, value))
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
            return attended.transpose(1, 2).flatten(0, 1)

        return self._forward(ids.flatten(), positions, attend).unflatten(0, (prompts, tokens))

    def step(self, tokens_B: Tensor, positions_B: Tensor, cache: SlotCache) -> Tensor:
        seen = torch.arange(cache.longest, device=positions_B.device) <= positions_B[:, None]
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        mask = mask[:, None, None]

        def attend(layer: int, scaling: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.write(layer, key, value)
            # The query heads that share a key head stand in for a query length: no key or value is repeated.
            grouped = query.unflatten(1, (key.shape[1], -1))
            if grouped.is_cpu:
                return _attend_on_cpu(grouped, keys, values, mask, scaling).flatten(1, 2)
            attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
            return attended.flatten(1, 2)

        return self._forward(tokens_B, positions_B, attend)

    def _forward(self, ids_T: Tensor, positions_T: Tensor, attend) -> Tensor:  # type: ignore[no-untyped-def]
        """ids [T] -> hidden [T, H]. attend(layer, scaling, query [T, H, D], key, value [T, K, D]) -> [T, H, D]"""
        assert self.table is not None
        device = ids_T.device.type
        with torch.autocast(device, enabled=False):
            cos, sin = (part[positions_T][:, None] for part in self.table)  # [T, 1, D]
            hidden = F.embedding(ids_T, full_tensor(self.base.get_input_embeddings().weight)).float()
            for index, layer in enumerate(self.layers):
                weights = layer.tensors
                normed = _norm(hidden, layer.norms[0]).to(self.dtype)
                mixed = _product(normed, weights["qkv"], weights.get("qkv_bias")).unflatten(-1, (-1, layer.head_dim))
                query, key, value = mixed.split(layer.heads, dim=1)
                if layer.head_norms[0] is not None:
                    query, key = (
                        _norm(part.float(), norm) for part, norm in zip((query, key), layer.head_norms, strict=True)
                    )
                query, key = (_rotate(part, cos, sin).to(self.dtype) for part in (query, key))
                attended = attend(index, layer.scaling, query, key, value)
                hidden = hidden + _product(attended.flatten(1), weights["out"])
                normed = _norm(hidden, layer.norms[1]).to(self.dtype)
                gate, up = _product(normed, weights["gate_up"]).chunk(2, dim=-1)
                hidden = hidden + _product(F.silu(gate).mul_(up), weights["down"])
            return _norm(hidden, self.base.norm)

    def _rotary(self, length: int) -> None:
        """cos and sin [length, D] for every position, from the model's own module."""
        if self.table is None or len(self.table[0]) < length or self.table[0].device != self.model.device:
            positions = torch.arange(length, device=self.model.device)[None]
            with torch.autocast(self.model.device.type, enabled=False):
                cos, sin = self.base.rotary_emb(torch.zeros(1, device=self.model.device), positions)
            self.table = (cos[0].float(), sin[0].float())


def _norm(hidden: Tensor, norm: Any) -> Tensor:
    weight = full_tensor(norm.weight).float()
    if not hidden.is_cpu:
        return F.rms_norm(hidden, weight.shape, weight, norm.variance_epsilon)
    # On a CPU, F.rms_norm is eight small operations; this is the same in six, of which three are on [T, 1].
    size = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return hidden * torch.rsqrt_(size.square_().div_(len(weight)).add_(norm.variance_epsilon)) * weight


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) on [T, heads, D], in the half-split layout that transformers uses."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def _product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, I] and [O, I] -> [B, O]."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return F.linear(states, weight, bias)


def _packs(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight is worth packing: on a CPU, where a product of a dozen rows with a weight in its plain layout takes up
    to four times as long as with one that oneDNN has laid out for itself."""
    return tensor.is_cpu and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.float().contiguous())


def _attend_on_cpu(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """query [B, K, S, D], keys and values [B, K, L, D], mask [B, 1, 1, L] -> [B, K, S, D]: two batched products, which beat
    the CPU's fused attention at a query length of a few."""
    rows, heads, shared, _ = query.shape
    mask = mask.expand(rows, heads, 1, mask.shape[-1]).flatten(0, 1)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    scores = torch.baddbmm(mask, query.flatten(0, 1), keys.transpose(1, 2), alpha=scaling)
    return torch.bmm(scores.softmax(-1), values).unflatten(0, (rows, heads))


def _repeat(tensor: Tensor, heads: int) -> Tensor:
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole of a parameter that FSDP2 may hold in shards."""
    whole = getattr(parameter.detach(), "full_tensor", None)
    return whole() if whole is not None else parameter.detach()
