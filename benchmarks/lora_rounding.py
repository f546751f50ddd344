"""Measure which part of a small step of a LoRA adapter reaches a sampler that computes in 16 bits, on a CPU.

    python benchmarks/lora_rounding.py                                 the native engine, modules, and merged weights
    python benchmarks/lora_rounding.py --vllm merged [--dtype float32]     vLLM, in an environment that has it
    python benchmarks/lora_rounding.py --vllm adapter                  vLLM with the adapter beside its weights

A Qwen2 of width 256 has weights that are bfloat16 numbers, and an adapter with r 4. All numbers of B step from 0 to the
given size, with random signs. The exact change is that of the model's logprobs in float32. Printed are the part of it
that is in the change of the sampler's logprobs (their projection), and the error of that change over the exact one.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from shared import script_parser
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from grpo.config.schema import LoraConfig
from grpo.kernels.kv_cache import SlotCache
from grpo.models.logprob_model import use_grpo_attention
from grpo.models.lora import Adapter, add_adapter, lora_layers, save_adapter
from grpo.models.weights import WeightReader, WorkingCopy
from grpo.rollout.backbones import Backbone, ModuleBackbone, choose_backbone
from grpo.runtime.command import run_main

VOCABULARY, LENGTH, ROWS = 64, 24, 600
LORA = LoraConfig(r=4, lora_alpha=8)
SIZES = (1e-5, 1e-4, 1e-3)
CPU = torch.device("cpu")


def model_of() -> PreTrainedModel:
    """Return the model, from the same seed each time."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": True}
    config = Qwen2Config(vocab_size=VOCABULARY, **shape, **heads, **special)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = (parameter * (2.0 if parameter.ndim > 1 else 1.0)).bfloat16().float()
    return model


def prompts() -> Tensor:
    return torch.randint(2, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def take_step(model: PreTrainedModel, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        weight = layer.lora_B["default"].weight
        weight.data = torch.sign(torch.randn(weight.shape, generator=generator)) * size


@torch.no_grad()
def logprobs(backbone: Backbone, dtype: torch.dtype) -> Tensor:
    """Return the logprobs [ROWS, V] of the token after each prompt."""
    with torch.autocast("cpu", dtype=torch.bfloat16) if dtype == torch.bfloat16 else nullcontext():
        backbone.refresh()
        hidden = backbone.prefill(prompts(), SlotCache(1, LENGTH + 8, backbone.cache_dtype))
        return backbone.logits(hidden[:, -1]).double().log_softmax(-1)


def report(way: str, live: PreTrainedModel, sampler: Callable[[], Tensor]) -> None:
    """Print both numbers for each size."""
    exact = ModuleBackbone(live)
    for size in SIZES:
        take_step(live, 0.0)
        before, exact_before = sampler(), logprobs(exact, torch.float32)
        take_step(live, size)
        found, wanted = sampler() - before, logprobs(exact, torch.float32) - exact_before
        part = float((wanted * found).sum() / (wanted * wanted).sum())
        print(
            f"{way:28} {size:g}  part {part:6.3f}  error {float((found - wanted).norm() / wanted.norm()):.3g}",
            flush=True,
        )


def native_and_modules() -> None:
    for way in ("native engine", "modules", "modules, peft's own sum", "merged weights"):
        live = model_of()
        use_grpo_attention(live)
        copy = WorkingCopy(live, WeightReader())
        add_adapter(live, LORA, base="")
        if way != "merged weights":
            add_adapter(copy.model, LORA, base="")
            copy.model.eval()
        if way.startswith("modules, "):
            for _, layer in lora_layers(copy.model):
                layer.__class__ = type(layer).__mro__[1]
        copy.bind(live, CPU, compute_dtype=torch.bfloat16)
        copy.refresh()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            backbone = choose_backbone(copy.model)[0] if way == "native engine" else ModuleBackbone(copy.model)

        def sampler(copy: WorkingCopy = copy, backbone: Backbone = backbone) -> Tensor:
            copy.refresh()
            return logprobs(backbone, torch.bfloat16)

        report(way, live, sampler)


def vllm(way: str, dtype: str, folder: Path) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    live = model_of()
    live.save_pretrained(folder / "model")
    adapter: Adapter = add_adapter(live, LORA, base=str(folder / "model"))
    use_grpo_attention(live)
    from grpo.rollout.vllm_worker import register

    register()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(folder / "model"),
        dtype=dtype,
        load_format="dummy",
        enforce_eager=True,
        max_model_len=LENGTH + 8,
        max_num_seqs=64,
        max_logprobs=VOCABULARY,
        gpu_memory_utilization=0.3,
        seed=0,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enable_lora=way == "adapter",
        hf_overrides={"head_dtype": "float32"},
        worker_extension_cls="grpo.rollout.vllm_worker.Extension",
    )
    params = SamplingParams(temperature=1.0, max_tokens=1, logprobs=-1, seed=1)
    requests: list[Any] = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in WeightReader().full_weights(live, merges_adapter=way == "merged"):
            if ".lora_" not in name:
                yield name.replace(".base_layer", ""), tensor.to(getattr(torch, dtype))

    def sampler() -> Tensor:
        request = None
        if way == "adapter":
            path = folder / f"adapter-{len(requests)}"
            save_adapter(adapter, path)
            requests.append(request := LoRARequest(path.name, len(requests) + 1, str(path)))
        llm.collective_rpc("load_plain_weights", args=(weights(),))
        inputs: list[Any] = [{"prompt_token_ids": row} for row in prompts().tolist()]
        outputs = llm.generate(inputs, params, use_tqdm=False, lora_request=request)
        found = [output.outputs[0].logprobs[0] for output in outputs]
        return torch.tensor([[row[token].logprob for token in range(VOCABULARY)] for row in found], dtype=torch.float64)

    report(f"vLLM, {way}, {dtype}", live, sampler)


def main() -> None:
    """Measure and print."""
    parser = script_parser(__doc__)
    parser.add_argument("--vllm", choices=("merged", "adapter"))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    flags = parser.parse_args()
    if flags.vllm is None:
        native_and_modules()
        return
    with tempfile.TemporaryDirectory() as folder:
        vllm(flags.vllm, flags.dtype, Path(folder))


if __name__ == "__main__":
    run_main(main)
