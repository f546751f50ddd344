"""Lean layers: whole decoder layers of the Llama family as one step of autograd -> the same numbers, with few calls.

Module by module, a layer is about forty operations and fifteen nodes of autograd. Between what is C, where all threads work, that
was a fifth of the time, in which one worked and the others waited. Here it is one call into layer.c, and two on the way back.

For packed batches in float32 on a CPU, where there is a C compiler, and for layers without adapters. Everything else, and
every layer that is not known, goes through its own modules, of which some have leaner parts (grpo/kernels/cpu/fused_ops.py, grpo/kernels/cpu/gemm.py).
Hooks on modules inside of a layer are not called.
"""

import ctypes
import functools
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from grpo.kernels.attention import PackedLayout
from grpo.kernels.cpu.attention import Sequences, attention_room, gathered, pointers, shares_for
from grpo.kernels.cpu.compiler import kernels, pointer, threads_for
from grpo.kernels.cpu.fused_ops import MLP, Norm, rotate_leanly
from grpo.kernels.cpu.gemm import Linear, fits, gradient_of, product_room, use_products

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP")
ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "SmolLM3Attention")
"""The classes of transformers whose forward pass, or whose RoPE, is the one that is written here."""


def use_lean_layers(model: PreTrainedModel, *, products: bool = True) -> None:
    """Give the norms, MLPs and RoPE of `model` that are known those of grpo/kernels/cpu/fused_ops.py, and with `products` its linear layers and embeddings
    those of grpo/kernels/cpu/gemm.py, and its layers what is written below."""
    if products:
        use_products(model)
    for module in model.modules():
        name = type(module).__name__
        if name in NORMS:
            module.__class__ = Norm
        elif name in MLPS and getattr(model.config, "hidden_act", None) == "silu":
            module.__class__ = MLP
        elif products and name in LAYERS:
            kind: Any = type(module)
            module.__class__ = _lean(kind)
        elif name in ATTENTIONS:
            rotate_leanly(sys.modules[type(module).__module__])


@functools.cache
def _lean(kind: type) -> type:
    """A class like `kind`, and of its name, by which others know it."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        parts = None if args else _parts(self, hidden_states, given)
        if parts is None:
            return kind.forward(self, hidden_states, *args, **given)  # type: ignore[attr-defined]
        layout, (cos, sin) = given["layout"], given["position_embeddings"]
        return _Layer.apply(hidden_states, cos, sin, layout, parts, *parts.weights, *layout.outside())

    def reduce(self: Any, protocol: Any) -> Any:  # to copy and to pickle: the class itself cannot be found by its name
        return _empty, (kind,), dict(self.__dict__)

    return type(kind.__name__, (kind,), {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__})


def _empty(kind: type) -> Any:
    made: Any = _lean(kind)
    return made.__new__(made)


@dataclass(frozen=True)
class _Parts:
    """What a layer is made of."""

    weights: tuple[Tensor | None, ...]
    """As in layer.c: of the norm, q, k and v, and the biases of these three, or None; of out, the second norm, gate, up and down."""
    epsilons: tuple[float, float]
    head_size: int
    scaling: float
    window: int | None

    @classmethod
    def of(cls, layer: Any, norms: list[Any], linears: list[Any]) -> "_Parts":
        query, key, value, out, *mlp = linears
        projections = (query, key, value)
        weights = (
            norms[0].weight,
            *(linear.weight for linear in projections),
            *(linear.bias for linear in projections),
            *(linear.weight for linear in (out, norms[1], *mlp)),
        )
        attention = layer.self_attn
        # Mistral's reads its window from the config; Llama has none.
        reader = attention.config if type(attention).__name__ == "MistralAttention" else attention
        window = getattr(reader, "sliding_window", None)
        epsilons = (norms[0].variance_epsilon, norms[1].variance_epsilon)
        return cls(weights, epsilons, attention.head_dim, attention.scaling, window)


def _parts(layer: Any, hidden: Tensor, given: dict[str, Any]) -> _Parts | None:
    """None where the modules are to do it."""
    layout, turns = given.get("layout"), given.get("position_embeddings")
    if (
        not isinstance(layout, PackedLayout)
        or turns is None
        or given.get("past_key_values") is not None
        or given.get("attention_mask") is not None
        or len(hidden) != 1
    ):
        return None
    found: _Found | None = layer.__dict__.get("found")
    if found is None or not found.still:
        found = layer.found = _Found.of(layer)
    parts = found.parts
    if parts is None or any(turn.shape != (1, hidden.shape[1], parts.head_size) for turn in turns):
        return None
    return parts if fits(hidden, *turns, *parts.weights) else None


@dataclass(frozen=True)
class _Found:
    """What was found in a layer: looked for again only when something in it was replaced, since between calls into C, where the caches
    hold other things, each look costs."""

    parts: _Parts | None
    places: list[tuple[dict[str, Any], str, Any]]
    """Modules and parameters, and where each was found."""

    @property
    def still(self) -> bool:
        return all(place.get(name) is thing for place, name, thing in self.places)

    @classmethod
    def of(cls, layer: Any) -> "_Found":
        attention, mlp = layer.self_attn, layer.mlp
        if type(attention).__name__ not in ATTENTIONS or type(mlp) is not MLP:
            return cls(None, [(layer._modules, "self_attn", attention), (layer._modules, "mlp", mlp)])
        modules = [(layer, name) for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")]
        modules += [(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        modules += [(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")]
        found = [(parent._modules, name, getattr(parent, name)) for parent, name in modules]
        places = [
            (module._parameters, name, value) for *_, module in found for name, value in module._parameters.items()
        ]
        norms, linears = [module for *_, module in found[2:4]], [module for *_, module in found[4:]]
        known = (
            all(type(module) is Norm for module in norms)
            and all(type(module) is Linear for module in linears)
            and all(module.bias is None for module in linears[3:])
            and attention.head_dim % 8 == 0
            and not attention.attention_dropout
        )
        return cls(_Parts.of(layer, norms, linears) if known else None, [*found, *places])


class _Layer(torch.autograd.Function):
    """hidden [1, T, H], cos and sin [1, T, D], what `_Parts` names, and keys and values of prompts elsewhere, [1, K, P, D] each, ->
    [1, T, H]"""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout, parts: _Parts, *tensors: Tensor
    ) -> Tensor:
        weights, outside = tensors[: len(parts.weights)], tensors[len(parts.weights) :]
        prompts = [prompt.transpose(1, 2).contiguous() for prompt in outside]
        shape = _Shape.of(hidden, parts, layout.sequences)
        kept, result = hidden.new_empty(sum(shape.kept)), torch.empty_like(hidden)
        layer = shape.layer(weights, prompts, hidden, cos, sin, kept)
        scratch, rooms = hidden.new_empty(shape.tokens * (shape.width + shape.inside + 1)), shape.rooms(hidden)
        kernels().layer_forward(shape.threads, *map(_address, (layer, scratch, *rooms, result)))
        ctx.save_for_backward(hidden, cos, sin, kept, *weights, *prompts)
        ctx.shape, ctx.joins = shape, []
        if layout.watched:
            _, key, value, *_ = kept.split(shape.kept)
            shown = (them.view(1, shape.tokens, -1, shape.size).transpose(1, 2) for them in (key, value))
            ctx.joins = layout.watch(*shown)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        shape, (hidden, cos, sin, kept, *others) = ctx.shape, ctx.saved_tensors
        owners = shape.parts.weights  # themselves, whatever is done to what is saved
        weights, prompts = others[: len(owners)], others[len(owners) :]
        layer, gradient = shape.layer(weights, prompts, hidden, cos, sin, kept), gradient.contiguous()
        made, targets = _targets(owners, ctx.needs_input_grad[5:])
        # Twice as wide as hidden and inside, as heads, and a scale; and for each thread its share of a norm's gradient.
        numbers = 2 * (shape.width + shape.inside) + shape.heads * shape.size + 1
        scratch = hidden.new_empty(shape.tokens * numbers + shape.threads * shape.width)
        rooms = shape.rooms(hidden, learning=True)
        grad_middle, grad_query = torch.empty_like(hidden), hidden.new_empty(shape.tokens, shape.heads, shape.size)
        shares = shares_for(grad_query, shape.sequences, shape.tokens, shape.key_heads, shape.threads)
        given = (layer, targets, gradient, scratch, *rooms, grad_middle, grad_query, *shares)
        kernels().layer_backward(shape.threads, shares.shape[2], *map(_address, given))
        (grad_key, grad_value), outside = gathered(shares, shape.sequences, shape.tokens, shape.key_heads, ctx.joins)
        grad_hidden = torch.empty_like(hidden)
        given = (layer, targets, grad_query, grad_key, grad_value, grad_middle, scratch, rooms[0], grad_hidden)
        kernels().layer_backward_inputs(shape.threads, *map(_address, given))
        return grad_hidden, None, None, None, None, *made, *outside


def _targets(weights: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[list[Tensor | None], ctypes.Array]:
    """Where layer.c adds gradients; -> those that were made for autograd, and Gradients in layer.c."""
    made: list[Tensor | None] = [None] * len(weights)
    there: list[Tensor | None] = [None] * len(weights)
    for index, weight in enumerate(weights):
        if weight is not None and wanted[index]:
            there[index] = gradient_of(weight)
            if there[index] is None:
                there[index] = made[index] = torch.zeros_like(weight)
    return made, (ctypes.c_void_p * len(weights))(*map(pointer, there))


class _Described(ctypes.Structure):
    """Layer in layer.c"""

    _fields_ = [
        ("counts", ctypes.c_int32 * 10),
        ("numbers", ctypes.c_float * 3),
        ("plan", ctypes.c_void_p * 4),
        ("weights", ctypes.c_void_p * 12),
        ("inputs", ctypes.c_void_p * 3),
        ("kept", ctypes.c_void_p * 8),
    ]


def _address(it: Any) -> int | None:
    return pointer(it) if isinstance(it, Tensor) else ctypes.addressof(it)


@dataclass(frozen=True)
class _Shape:
    """T tokens of width H, and what is as wide as the MLP's inside or the heads."""

    tokens: int
    width: int
    inside: int
    heads: int
    key_heads: int
    size: int
    threads: int
    parts: _Parts
    sequences: Sequences

    @classmethod
    def of(cls, hidden: Tensor, parts: _Parts, sequences: Sequences) -> "_Shape":
        (tokens, width), size = hidden.shape[1:], parts.head_size
        query, key, inside = (parts.weights[index].shape[0] for index in (1, 2, 9))  # type: ignore[union-attr]
        threads = threads_for(tokens * (width + inside))
        return cls(tokens, width, inside, query // size, key // size, size, threads, parts, sequences)

    @property
    def kept(self) -> list[int]:
        """How many numbers there are of query, key, value, what attention gave, log-sum-exps, middle, gate and up."""
        query, key = self.heads * self.size, self.key_heads * self.size
        return [
            self.tokens * each for each in (query, key, key, query, self.heads, self.width, self.inside, self.inside)
        ]

    def rooms(self, hidden: Tensor, *, learning: bool = False) -> tuple[Tensor, Tensor]:
        """For products and for attention."""
        attention = attention_room(hidden, self.size, self.sequences, self.threads, learning=learning)
        return product_room(self.threads), attention

    def layer(
        self, weights: Sequence[Tensor], prompts: list[Tensor], hidden: Tensor, cos: Tensor, sin: Tensor, kept: Tensor
    ) -> _Described:
        counts = (self.tokens, self.width, self.inside, self.heads, self.key_heads, self.size, self.parts.window or 0)
        rows, groups = self.sequences.rows, self.sequences.groups
        described = _Described(
            (ctypes.c_int32 * 10)(*counts, self.sequences.longest, len(rows), len(groups) - 1),
            (ctypes.c_float * 3)(*self.parts.epsilons, self.parts.scaling),
        )
        described.prompts = pointers(prompts)  # keeps them alive
        described.plan[:] = [pointer(rows), pointer(groups), *map(ctypes.addressof, described.prompts)]
        described.weights[:] = [*map(pointer, weights)]
        described.inputs[:] = [*map(pointer, (cos, sin, hidden))]
        start = pointer(kept)  # no views: each would cost as much as all of this
        described.kept[:] = [start and start + 4 * first for first in itertools.accumulate(self.kept[:-1], initial=0)]
        return described
