"""Model families: a transformers model -> its description (grpo/kernels/description.py), which kernels read.

There is one entry for each family whose layers are those of Llama, with its differences. The start-up check compares
the result with the model's own modules, so a wrong entry makes a run slower but not wrong.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.kernels.description import Adapter, Layer, Linear, Model
from grpo.models.architecture import text_config, text_decoder
from grpo.models.lora import ADAPTER_NAME
from grpo.models.norms import is_rms_norm


@dataclass(frozen=True)
class Family:
    """Differences of a family's layers from those of Llama."""

    window: Callable[[Any], int | None] = lambda attention: None
    """Return the sliding window of an attention module."""
    norms_heads: bool = False
    """Queries and keys go through an RMSNorm of each head."""
    rotary: Callable[[Any], bool] = lambda attention: True
    """Return whether an attention module has a rotary embedding."""


def _own_window(attention: Any) -> int | None:
    return attention.sliding_window


FAMILIES = {
    "llama": Family(),
    "mistral": Family(window=lambda attention: attention.config.sliding_window),
    "qwen2": Family(window=_own_window),
    "qwen3": Family(window=_own_window, norms_heads=True),
    "smollm3": Family(window=_own_window, rotary=lambda attention: bool(attention.use_rope)),
}
"""`model_type` of the config -> family."""

PACKED = frozenset(
    {
        "apertus",
        "arcee",
        "bamba",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "falcon_h1",
        "gemma",
        "gemma3",
        "gemma3_text",
        "gemma3n_text",
        "gemma4",
        "gemma4_text",
        "glm4",
        "glm4_moe",
        "gpt2",
        "gpt_neox",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "helium",
        "hrm_text",
        "hunyuan_v1_dense",
        "jamba",
        "lfm2",
        "lfm2_moe",
        "llama",
        "mamba2",
        "minicpm3",
        "ministral",
        "ministral3",
        "mistral",
        "mistral3",
        "mixtral",
        "nanochat",
        "nemotron_h",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_5",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl",
        "seed_oss",
        "smollm3",
        "starcoder2",
    }
)
"""`model_type` of the families whose packed rows were found exact (tests/models/test_families.py, docs/models.md)."""

ROWS = {
    "bloom": "adds a bias of its own to the attention (ALiBi)",
    "codegen": "does not use transformers' attention interface",
    "falcon": "does not use transformers' attention interface",
    "gemma2": "has a softcap in its attention",
    "gpt_oss": "has sinks in its attention",
    "gptj": "does not use transformers' attention interface",
    "llama4_text": "attends in chunks",
    "mamba": "has recurrent layers without a packed form here",
    "minimax": "has recurrent layers without a packed form here",
    "mpt": "adds a bias of its own to the attention (ALiBi)",
    "recurrent_gemma": "has recurrent layers without a packed form here",
    "stablelm": "does not pass the layout of a packed row to its layers",
}
"""`model_type` of the families that are exact on plain rows only, and the reason. They need rollout.engine
transformers."""

FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the sequence length."""


def describe(model: PreTrainedModel) -> Model | None:
    """Return the description of `model`. None if its modules must be called.

    That is the case for an unknown family, a model class from outside transformers, weights that are sharded or
    quantized, hooks on a module that would not be called, an activation other than SiLU, or a layer that differs from
    its family.
    """
    config = text_config(model.config)
    family = FAMILIES.get(config.model_type)
    base = text_decoder(model)
    if family is None or not type(model).__module__.startswith("transformers.models."):
        return None
    if getattr(config, "hidden_act", None) != "silu":
        return None
    try:
        embedding: Any = base.embed_tokens
        layers = tuple(_layer(layer, family) for layer in base.layers)
        _check_modules([base, embedding, base.norm])
        if (
            type(embedding) is not nn.Embedding
            or embedding.max_norm
            or embedding.scale_grad_by_freq
            or embedding.sparse
        ):
            raise _NotDescribed
        weights = (_weight(embedding.weight), _weight(base.norm.weight))
        padding, epsilon = embedding.padding_idx, base.norm.variance_epsilon
    except (AttributeError, _NotDescribed):
        return None
    rotary: Any = base.rotary_emb
    checkpointed = any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in base.layers)
    return Model(weights[0], padding, layers, weights[1], float(epsilon), rotary, checkpointed)


def rope_is_fixed(model: PreTrainedModel) -> bool:
    """Return whether one table of cosines and sines by position is valid for all lengths."""
    rope = getattr(text_config(model.config), "rope_parameters", None) or {}
    return rope.get("rope_type", "default") in FIXED_ROPE_TYPES


class _NotDescribed(Exception):
    """The module cannot be expressed in a description."""


def _layer(layer: Any, family: Family) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    _check_modules([layer, attention, mlp, layer.input_layernorm, layer.post_attention_layernorm])
    head_norms: dict[str, Any] = {}
    if family.norms_heads:
        _check_modules([attention.q_norm, attention.k_norm])
        head_norms = {
            "query_norm": _weight(attention.q_norm.weight),
            "key_norm": _weight(attention.k_norm.weight),
            "head_epsilon": attention.q_norm.variance_epsilon,
        }
    size = attention.head_dim
    query, key = _linear(attention.q_proj), _linear(attention.k_proj)
    if attention.attention_dropout and layer.training:
        raise _NotDescribed
    return Layer(
        norm=_weight(layer.input_layernorm.weight),
        query=query,
        key=key,
        value=_linear(attention.v_proj),
        out=_linear(attention.o_proj),
        mlp_norm=_weight(layer.post_attention_layernorm.weight),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        epsilon=layer.input_layernorm.variance_epsilon,
        mlp_epsilon=layer.post_attention_layernorm.variance_epsilon,
        heads=query.weight.shape[0] // size,
        key_heads=key.weight.shape[0] // size,
        head_size=size,
        scaling=attention.scaling,
        window=family.window(attention),
        rotary=family.rotary(attention),
        **head_norms,
    )


def _linear(module: Any) -> Linear:
    _check_modules([module])
    if type(module) is nn.Linear:
        return Linear(_weight(module.weight), _bias(module))
    base = getattr(module, "base_layer", None)
    if type(base) is not nn.Linear or not hasattr(module, "lora_A"):
        raise _NotDescribed
    _check_modules([base, module.lora_A, module.lora_B])
    frozen = Linear(_weight(base.weight), _bias(base))
    if module.disable_adapters:
        return frozen
    # Only the adapters of grpo/models/lora.py: one, without dropout, bias or variant, not merged.
    variant = getattr(module, "lora_variant", {})
    if module.merged or module.active_adapters != [ADAPTER_NAME] or ADAPTER_NAME in variant:
        raise _NotDescribed
    low, high = module.lora_A[ADAPTER_NAME], module.lora_B[ADAPTER_NAME]
    _check_modules([low, high, module.lora_dropout[ADAPTER_NAME]])
    if low.bias is not None or high.bias is not None or not isinstance(module.lora_dropout[ADAPTER_NAME], nn.Identity):
        raise _NotDescribed
    scale = float(module.scaling[ADAPTER_NAME])
    return Linear(frozen.weight, frozen.bias, Adapter(_weight(low.weight), _weight(high.weight), scale))


def _bias(module: nn.Linear) -> Tensor | None:
    return None if module.bias is None else _weight(module.bias)


def _weight(parameter: Tensor) -> Tensor:
    """Return `parameter` if it is an ordinary tensor of this process. Raise _NotDescribed otherwise."""
    if type(parameter) not in (Tensor, nn.Parameter) and not isinstance(parameter, torch._subclasses.FakeTensor):
        raise _NotDescribed
    if hasattr(parameter, "ds_id"):  # ZeRO-3 gathers it only while its module is called
        raise _NotDescribed
    return parameter


def _check_modules(modules: list[Any]) -> None:
    """Raise _NotDescribed if calling one of the modules would do more than its own forward pass."""
    for module in modules:
        if any(_hooks(module)) or ("forward" in module.__dict__ and not is_rms_norm(module)):
            raise _NotDescribed


def _hooks(module: nn.Module) -> Iterator[Any]:
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        # transformers registers this hook for reentrant gradient checkpointing, which is not used here.
        yield from (hook for hook in hooks.values() if getattr(hook, "__name__", "") != "make_inputs_require_grads")
