"""Estimated memory of published model shapes on common machines. Nothing is loaded or measured."""

import logging
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from grpo.config.parser import load_config
from grpo.models.strategies.base import Machine
from grpo.tools.memory import estimate, simulate

log = logging.getLogger(__name__)

PUBLISHED = {  # hidden, MLP, layers, heads, key/value heads, vocabulary, tied: their config.json on the hub
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 152064, False),
    "Qwen2.5-32B": (5120, 27648, 64, 40, 8, 152064, False),
}
MACHINES = {
    "single_gpu": Machine("single", 1, "bf16", False),
    "multi_gpu (8)": Machine("ddp", 8, "bf16", False),
    "fsdp2 (8)": Machine("fsdp2", 8, "bf16", False, True),
    "deepspeed_zero2 (8)": Machine("zero2", 8, "bf16", False),
    "deepspeed_zero3 (8)": Machine("zero3", 8, "bf16", False),
    "multi_node_fsdp2 (16)": Machine("fsdp2", 16, "bf16", False, True),
}
PROMPT_TOKENS = 256
COMMON = [
    "--model.name=x",
    "--model.gradient_checkpointing=true",
    "--sampling.num_generations=8",
    "--prompts_per_step=16",
]
METHODS = {
    "full": [*COMMON, "--objective.beta=0"],
    "full, with reference": COMMON,
    "LoRA": [*COMMON, "--lora.r=16", "--model.torch_dtype=bfloat16"],
}


def estimate_published() -> dict[str, Any]:
    """Return the report: its settings, and GiB per GPU for each model, method and machine."""
    rows = []
    for name in PUBLISHED:
        model = published_shape(name)
        for method, flags in METHODS.items():
            config = load_config(flags)
            # The simulation depends on the number of processes, not on the kind of machine.
            simulated = {
                machine.processes: simulate(model, config, PROMPT_TOKENS, machine)
                for machine in {machine.processes: machine for machine in MACHINES.values()}.values()
            }
            peaks = {
                where: estimate(config, model, PROMPT_TOKENS, machine, simulated[machine.processes])["peak"]
                for where, machine in MACHINES.items()
            }
            rows.append({"model": name, "way": method, "gib_per_gpu": {key: round(v, 1) for key, v in peaks.items()}})
            log.info("%s, %s", name, method)
    return {
        "command": "python launch/memory.py --published --output docs/results/memory_fits.json",
        "what": "GiB on each GPU at the peak, computed by grpo/tools/memory.py, not measured; "
        "CUDA context and gaps not included",
        "settings": f"16 prompts of {PROMPT_TOKENS} tokens x 8 completions of 512, tokens_per_batch 8192, gradient "
        "checkpointing, bf16; LoRA: r 16 on every linear layer, base in bfloat16",
        "rows": rows,
    }


def published_shape(name: str) -> PreTrainedModel:
    """Return a published model on the "meta" device."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = PUBLISHED[name]
    shape = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
