"""Tiny random hybrid models: layers of every kind, with odd sizes where the family allows it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
DELTA_NET = {
    "intermediate_size": 48,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 4,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16}
HYBRIDS: dict[str, dict[str, object]] = {
    "qwen3_5_text": DELTA_NET
    | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 0],
            "partial_rotary_factor": 0.5,
        }
    },
    "qwen3_next": DELTA_NET
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "lfm2": {
        "intermediate_size": 48,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": 3,
        "full_attn_idxs": [1],
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "granitemoehybrid": MAMBA2
    | {
        "intermediate_size": 48,
        "shared_intermediate_size": 48,
        "num_local_experts": 0,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "bamba": MAMBA2 | {"intermediate_size": 48, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "nemotron_h": {
        "intermediate_size": 48,
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
    },
    "falcon_h1": MAMBA2
    | {"intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "mamba_d_ssm": 64, "mamba_expand": 2},
    "jamba": {
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "mamba2": {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 16},
}
HYBRIDS |= {
    "lfm2_moe": HYBRIDS["lfm2"]
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_dense_layers": 1},
    "lfm3": HYBRIDS["lfm2"],
    "olmo_hybrid": DELTA_NET,
    "qwen3_5_moe_text": HYBRIDS["qwen3_5_text"]
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}
FAST = ("qwen3_5_text", "lfm2", "granitemoehybrid", "jamba")
"""One family for each kind of recurrence. The tests of the others are slow."""
families = pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family in FAST else pytest.mark.slow) for family in HYBRIDS]
)


def hybrid(family: str, spread: float = 3.0, **changes: object) -> PreTrainedModel:
    """Return a random float32 model with transformers' own attention."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(COMMON | HYBRIDS[family] | changes))
    attention = "eager" if family == "mamba2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(spread)
            elif name.endswith(("dt_bias", "A_log", ".D")):
                parameter.uniform_(-1.0, 1.0)
    return model
