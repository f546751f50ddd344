"""One tiny random model of every family in docs/models.md: its config, and a folder with weights and tokenizer.

Windows are shorter than the sequences of the tests, and every scale, softcap and bias that a family has is set.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.fakes import save_tokenizer

VOCABULARY = 48
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
DEEPSEEK = ROUTED | {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
IMAGE_TOKENS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
)
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Zoo:
    """How a family's tiny config differs from SHAPE. None in `changes` removes a key."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    """Set for a multimodal wrapper: the zoo entry of its text config."""


ZOO: dict[str, Zoo] = {
    "llama": Zoo("llama"),
    "mistral": Zoo("mistral", {"sliding_window": 4}),
    "ministral": Zoo("ministral", WINDOWS),
    "ministral3": Zoo("ministral3", {"sliding_window": None}),
    "qwen2": Zoo("qwen2"),
    "qwen2 window": Zoo("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2_moe": Zoo("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3": Zoo("qwen3"),
    "qwen3_moe": Zoo("qwen3_moe", EXPERTS),
    "qwen3_next": Zoo("qwen3_next", EXPERTS | DELTA | {"shared_expert_intermediate_size": 16}),
    "qwen3_5_text": Zoo("qwen3_5_text", DELTA),
    "qwen3_5": Zoo("qwen3_5", {"vision_config": QWEN_VISION}, "qwen3_5_text"),
    "qwen3_vl": Zoo("qwen3_vl", {"vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]}}, "qwen3_vl_text"),
    "gemma": Zoo("gemma"),
    "gemma2": Zoo("gemma2", WINDOWS | {"query_pre_attn_scalar": 8}),
    "gemma3_text": Zoo("gemma3_text", WINDOWS | {"query_pre_attn_scalar": 8}),
    "gemma3": Zoo(
        "gemma3",
        {"vision_config": VISION | {"image_size": 16, "patch_size": 8}, "mm_tokens_per_image": 4},
        "gemma3_text",
    ),
    "gemma3n_text": Zoo(
        "gemma3n_text",
        WINDOWS
        | {
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
            "intermediate_size": [48, 48],
        },
    ),
    "gemma4_text": Zoo(
        "gemma4_text",
        WINDOWS
        | {
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma4": Zoo(
        "gemma4",
        {"vision_config": VISION | {"num_key_value_heads": 2, "head_dim": 8}, "audio_config": None},
        "gemma4_text",
    ),
    "phi": Zoo("phi", {"num_key_value_heads": 4, "head_dim": None}),
    "phi3": Zoo("phi3", {"head_dim": None}),
    "phi3 longrope": Zoo(
        "phi3",
        {
            "head_dim": None,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "phimoe": Zoo(
        "phimoe",
        LOCAL_EXPERTS | {"head_dim": None, "router_jitter_noise": 0.1, "input_jitter_noise": 0.1, "lm_head_bias": True},
    ),
    "smollm3": Zoo("smollm3"),
    "olmo": Zoo("olmo"),
    "olmo2": Zoo("olmo2"),
    "olmo3": Zoo("olmo3", WINDOWS),
    "olmoe": Zoo("olmoe", EXPERTS),
    "granite": Zoo(
        "granite",
        {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "granitemoe": Zoo("granitemoe", LOCAL_EXPERTS | {"logits_scaling": 4.0}),
    "granitemoehybrid": Zoo(
        "granitemoehybrid",
        LOCAL_EXPERTS
        | MAMBA
        | {"layer_types": ["mamba", "attention"], "logits_scaling": 4.0, "shared_intermediate_size": 48},
    ),
    "granitemoehybrid dense": Zoo(
        "granitemoehybrid",
        MAMBA
        | {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "logits_scaling": 4.0,
            "shared_intermediate_size": 48,
        },
    ),
    "lfm2": Zoo("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": Zoo("lfm2_moe", EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "falcon_h1": Zoo("falcon_h1", MAMBA | {"lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, "mamba_d_ssm": 64}),
    "nemotron_h": Zoo(
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": None,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "gpt_oss": Zoo("gpt_oss", LOCAL_EXPERTS | WINDOWS),
    "glm4": Zoo("glm4"),
    "glm4_moe": Zoo("glm4_moe", ROUTED),
    "deepseek_v2": Zoo("deepseek_v2", DEEPSEEK | {"topk_method": "greedy"}),
    "deepseek_v3": Zoo("deepseek_v3", DEEPSEEK),
    "cohere": Zoo("cohere", {"head_dim": None, "logit_scale": 0.25}),
    "cohere2": Zoo("cohere2", WINDOWS | {"logit_scale": 0.25}),
    "exaone4": Zoo("exaone4", WINDOWS),
    "ernie4_5": Zoo("ernie4_5"),
    "ernie4_5_moe": Zoo(
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1,
        },
    ),
    "hunyuan_v1_dense": Zoo("hunyuan_v1_dense"),
    "stablelm": Zoo("stablelm", {"head_dim": None}),
    "starcoder2": Zoo(
        "starcoder2",
        {
            "head_dim": None,
            "sliding_window": 4,
            "attention_dropout": 0.1,
            "residual_dropout": 0.1,
            "embedding_dropout": 0.1,
        },
    ),
    "gpt2": Zoo("gpt2", {"head_dim": None, "num_key_value_heads": None}),
    "gpt_neox": Zoo("gpt_neox", {"head_dim": None, "num_key_value_heads": None}),
    "gptj": Zoo(
        "gptj",
        {
            "head_dim": None,
            "num_key_value_heads": None,
            "rotary_dim": 4,
            "num_hidden_layers": None,
            "n_layer": 2,
            "hidden_size": None,
            "n_embd": 32,
            "num_attention_heads": None,
            "n_head": 4,
            "max_position_embeddings": None,
            "n_positions": 512,
            "tie_word_embeddings": False,
        },
    ),
    "opt": Zoo("opt", {"head_dim": None, "num_key_value_heads": None, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bamba": Zoo("bamba", MAMBA | {"attn_layer_indices": [1], "num_hidden_layers": 2}),
    "jamba": Zoo(
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "mamba": Zoo("mamba", {"head_dim": None, "num_key_value_heads": None, "state_size": 8}),
    "mamba2": Zoo(
        "mamba2",
        {
            "num_heads": 4,
            "head_dim": 16,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "num_key_value_heads": None,
            "num_attention_heads": None,
        },
    ),
    "mixtral": Zoo("mixtral", LOCAL_EXPERTS | {"sliding_window": 4}),
    "minimax": Zoo("minimax", LOCAL_EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8}),
    "minicpm3": Zoo(
        "minicpm3",
        {
            "num_key_value_heads": 4,
            "head_dim": None,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "dim_model_base": 8,
        },
    ),
    "recurrent_gemma": Zoo(
        "recurrent_gemma",
        {
            "block_types": ["recurrent", "attention"],
            "lru_width": 32,
            "attention_window_size": 8,
            "num_key_value_heads": 1,
            "logits_soft_cap": 5.0,
        },
    ),
    "apertus": Zoo("apertus"),
    "arcee": Zoo("arcee"),
    "seed_oss": Zoo("seed_oss"),
    "nanochat": Zoo("nanochat"),
    "helium": Zoo("helium"),
    "hrm_text": Zoo("hrm_text"),
    "mistral3": Zoo(
        "mistral3",
        {"vision_config": VISION | {"model_type": "pixtral", "image_size": 16, "patch_size": 8, "head_dim": 8}},
        "ministral3",
    ),
    "llama4_text": Zoo("llama4_text", LOCAL_EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": 8}),
    "bloom": Zoo("bloom", {"head_dim": None, "num_key_value_heads": None}),
    "falcon": Zoo("falcon", {"head_dim": None, "num_key_value_heads": None}),
    "mpt": Zoo("mpt", {"head_dim": None, "num_key_value_heads": None}),
    "codegen": Zoo("codegen", {"head_dim": None, "num_key_value_heads": None, "rotary_dim": 4}),
}


def text_settings(name: str) -> dict[str, Any]:
    """Return the keyword arguments of the (text) config."""
    merged = SHAPE | (ZOO[name].changes if name in ZOO else {})
    return {key: value for key, value in merged.items() if value is not None or key == "bos_token_id"}


def tiny_config(name: str) -> PreTrainedConfig:
    """Return the config of the tiny model."""
    entry = ZOO[name]
    if entry.text is None:
        return CONFIG_MAPPING[entry.model_type](**text_settings(name))
    special = {key: 40 + place for place, key in enumerate(IMAGE_TOKENS)}
    text = text_settings(entry.text) | {"model_type": entry.text}
    return CONFIG_MAPPING[entry.model_type](
        text_config=text, eos_token_id=0, pad_token_id=1, **special, **entry.changes
    )


def tiny_zoo_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a random model whose distributions are far from uniform. Persistent buffers are random too."""
    torch.manual_seed(seed)
    kind = AutoModelForCausalLM if ZOO[name].text is None else AutoModelForImageTextToText
    model = kind.from_config(tiny_config(name), dtype=torch.float32)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
            elif part.endswith("bias"):
                parameter.normal_(0, 0.5)
        saved = set(model.state_dict())
        for part, buffer in model.named_buffers():
            if part in saved and buffer.is_floating_point():
                buffer.add_(0.3 * torch.rand_like(buffer))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 1
    return model.eval()


def zoo_folder(name: str, path: Path, seed: int = 0) -> Path:
    """Save the tiny model with the tokenizer of tests/fakes.py."""
    save_tokenizer(path)
    tiny_zoo_model(name, seed).save_pretrained(path)
    return path
