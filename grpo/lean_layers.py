"""Lean layer: a whole decoder layer of the Llama family as one step of autograd -> the same numbers, with few calls.

    middle = hidden + out(attention(RoPE(q, k), v))      q, k, v = projections of norm(hidden)
    result = middle + down(silu(gate) * up)              gate, up = projections of norm(middle)

Module by module, a layer is about forty operations and fifteen nodes of autograd. Between what is C, where all threads work, that
is a fifth of the time, in which one works and the others wait. Here it is what is C, and little else. Of the inside are kept q, k, v,
what attention gave, middle, gate and up; the norms and the gated product are formed again on the way back.

For packed batches in float32 on a CPU, where there is a C compiler, and for layers without adapters. Everything else, and
every layer that is not known, goes through its own modules.
"""

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from grpo import compiled_attention
from grpo.attention import NAME, PackedLayout
from grpo.compiled import plain
from grpo.compiled_attention import attend, attention_gradients
from grpo.lean import MLP, Norm, gated_mlp, mlp_gradients, norm_gradients, normed, rotate_leanly, turned
from grpo.products import Linear, fits, product, use_products, weight_gradient

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP")
ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "SmolLM3Attention")
"""The classes of transformers whose forward pass, or whose RoPE, is the one that is written here."""


def use_lean_layers(model: PreTrainedModel, *, products: bool = True) -> None:
    """Give the norms, MLPs and RoPE of `model` that are known those of grpo/lean.py, and with `products` its linear layers and embeddings
    those of grpo/products.py, and its layers what is written below."""
    if products:
        use_products(model)
    for module in model.modules():
        name = type(module).__name__
        if name in NORMS:
            module.__class__ = Norm
        elif name in MLPS and getattr(model.config, "hidden_act", None) == "silu":
            module.__class__ = MLP
        elif products and name in LAYERS:
            module.__class__ = _lean(type(module))
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

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


@dataclass(frozen=True)
class _Parts:
    """What a layer is made of."""

    weights: tuple[Tensor | None, ...]
    """of the norm, q, k, v, and the biases of these three, or None; of out, the second norm, gate, up and down"""
    epsilons: tuple[float, float]
    head_size: int
    scaling: float
    window: int | None


def _parts(layer: Any, hidden: Tensor, given: dict[str, Any]) -> _Parts | None:
    """None where the modules are to do it."""
    attention, mlp, norms = layer.self_attn, layer.mlp, (layer.input_layernorm, layer.post_attention_layernorm)
    layout, turns = given.get("layout"), given.get("position_embeddings")
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    others = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if (
        not isinstance(layout, PackedLayout)
        or turns is None
        or given.get("past_key_values") is not None
        or given.get("attention_mask") is not None
        or attention.config._attn_implementation != NAME
        or (layer.training and attention.attention_dropout)
        or attention.config.hidden_act != "silu"
        or any(type(part) is not Linear for part in (*projections, *others))
        or any(part.bias is not None for part in others)
        or any(type(norm) is not Norm for norm in norms)
        or attention.head_dim % 8
        or turns[0].shape != (*hidden.shape[:-1], attention.head_dim)
    ):
        return None
    weights = (
        norms[0].weight,
        *(part.weight for part in projections),
        *(part.bias for part in projections),
        others[0].weight,
        norms[1].weight,
        *(part.weight for part in others[1:]),
    )
    if not fits(hidden, *weights) or not plain(*turns) or compiled_attention.attention_library() is None:
        return None
    window = getattr(attention, "sliding_window", None)
    if "Mistral" in type(layer).__name__:  # it reads its window from the config
        window = getattr(attention.config, "sliding_window", None)
    epsilons = (norms[0].variance_epsilon, norms[1].variance_epsilon)
    return _Parts(weights, epsilons, attention.head_dim, attention.scaling, window)


class _Layer(torch.autograd.Function):
    """hidden [1, T, H], cos and sin [1, T, D], what `_Parts` names, and keys and values of prompts elsewhere, [1, K, P, D] each, ->
    [1, T, H]"""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout, parts: _Parts, *tensors: Tensor | None
    ) -> Tensor:
        weights, prompts = tensors[: len(parts.weights)], tensors[len(parts.weights) :]
        norm, *projections, out, mlp_norm, gate_weight, up_weight, down = weights
        prompts = [prompt.transpose(1, 2).contiguous() for prompt in prompts]
        states = hidden.flatten(0, -2)
        inside, scale = normed(states, norm, parts.epsilons[0])
        query, key, value = (
            product(inside, weight, b_across=True, bias=bias).view(1, len(states), -1, parts.head_size)
            for weight, bias in zip(projections[:3], projections[3:], strict=True)
        )
        query, key = (turned(them, cos, sin, back=False) for them in (query, key))
        joins = layout.watch(key.transpose(1, 2), value.transpose(1, 2))
        attended, lses = attend(query, key, value, prompts, layout.sequences, parts.scaling, parts.window)
        middle = product(attended.view(len(states), -1), out, b_across=True, into=states.clone())
        inside, mlp_scale = normed(middle, mlp_norm, parts.epsilons[1])
        result, gate, up = gated_mlp(inside, (gate_weight, up_weight, down), into=middle.clone())
        kept = (states, scale, query, key, value, attended, lses, middle, mlp_scale, gate, up, cos, sin)
        ctx.save_for_backward(*kept, *weights, *prompts)
        # The weights themselves, whatever is done to what is saved.
        ctx.owners, ctx.parts, ctx.sequences, ctx.joins = weights, parts, layout.sequences, joins
        return result.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        parts, saved = ctx.parts, ctx.saved_tensors
        states, scale, query, key, value, attended, lses, middle, mlp_scale, gate, up, cos, sin = saved[:13]
        weights, prompts = saved[13 : 13 + len(parts.weights)], saved[13 + len(parts.weights) :]
        norm, *projections, out, mlp_norm, gate_weight, up_weight, down = weights
        wanted = ctx.needs_input_grad[5 : 5 + len(weights)]
        grads: list[Tensor | None] = [None] * len(weights)

        def learn(index: int, gradient: Tensor, inputs: Tensor) -> None:
            if wanted[index]:
                grads[index] = weight_gradient(gradient, inputs, ctx.owners[index])

        shape, gradient = gradient.shape, gradient.flatten(0, -2).contiguous()
        inside, _ = normed(middle, mlp_norm, parts.epsilons[1])
        grad_inside, grads[9:] = mlp_gradients(
            gradient,
            inside,
            gate,
            up,
            (gate_weight, up_weight, down),
            owners=ctx.owners[9:],
            wanted=(True, *wanted[9:]),
        )
        grad_middle, grads[8] = norm_gradients(middle, mlp_norm, mlp_scale, grad_inside)
        grad_middle += gradient
        learn(7, grad_middle, attended.view(len(states), -1))
        grad_attended = product(grad_middle, out).view(attended.shape)
        plan = {"sequences": ctx.sequences, "scaling": parts.scaling, "window": parts.window, "joins": ctx.joins}
        grad_query, grad_key, grad_value, *outside = attention_gradients(
            grad_attended, query, key, value, attended, lses, *prompts, **plan
        )
        grad_query, grad_key = (turned(them, cos, sin, back=True) for them in (grad_query, grad_key))
        inside, _ = normed(states, norm, parts.epsilons[0])
        grad_inside = None
        for index, grad in enumerate((grad_query, grad_key, grad_value)):
            grad = grad.view(len(states), -1)
            learn(1 + index, grad, inside)
            if wanted[4 + index]:
                grads[4 + index] = grad.sum(0)
            grad_inside = product(grad, projections[index], into=grad_inside)
        grad_hidden, grads[0] = norm_gradients(states, norm, scale, grad_inside)
        grad_hidden += grad_middle
        return grad_hidden.view(shape), None, None, None, None, *grads, *(them.transpose(1, 2) for them in outside)
