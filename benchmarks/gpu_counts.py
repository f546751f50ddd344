"""Counts on a GPU: python benchmarks/gpu_counts.py [--shape qwen0.5b]. Needs an NVIDIA GPU; the weights are random.

    launches per decoder layer, forward and backward, for packed batches of 1, 4, 8 and 16 groups
    one update of 16,384 tokens: launches, waits of the host, float32 products, peak memory
    one rollout: launches outside of graphs, replays and waits per decoded token, memory of the graphs

The kernels come from torch.profiler, and the products from the operators that are called.
"""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from shared import script_parser
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from grpo.errors import ConfigError
from grpo.kernels.attention import NAME
from grpo.models.loading import recompute_activations
from grpo.models.logprob_model import LogprobModel
from grpo.packing import PackedBatch, pack
from grpo.rollout.engine import build_engine
from grpo.runtime.command import run_main
from grpo.runtime.device import configure
from grpo.types import Completion, Group, Prompt, SamplingPlan

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "qwen0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "qwen1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
TOKENS, COMPLETIONS, LONGEST = 16_384, 16, 786


class Tokenizer:
    """The attributes that an engine reads. The end token is never drawn: every completion has the full length."""

    eos_token_id, pad_token_id, bos_token_id = 151_935, 0, None

    def decode(self, ids: list[int], **_: Any) -> str:
        return ""


class Products(TorchDispatchMode):
    """Adds up the floating-point operations of matrix products by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = [part for part in args if isinstance(part, torch.Tensor)][-2:]  # without out_dtype
            self.operations[left.dtype] += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def model_of(**shape: Any) -> PreTrainedModel:
    config = Qwen2Config(vocab_size=151_936, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.set_attn_implementation(NAME)
    return model


def batch_of(groups: int, lengths: tuple[int, int]) -> PackedBatch:
    draw = random.Random(1)
    made = []
    for index in range(groups):
        prompt = Prompt(index, "", tuple(draw.randrange(1000) for _ in range(draw.randint(50, 90))))
        sizes = [draw.randint(*lengths) for _ in range(COMPLETIONS)]
        completions = [Completion([draw.randrange(1000) for _ in range(n)], [0.0] * n, True, "") for n in sizes]
        made.append(Group(prompt, completions))
    [batch] = pack(made, torch.ones(groups, COMPLETIONS), max_tokens=10**6)
    return batch.to(torch.device("cuda"))


def counted(work: Callable[[], object]) -> Counter[str]:
    """Return the numbers of launches, replays of graphs and waits of the host in `work`."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    found: Counter[str] = Counter(waits=-1)  # the one above
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:
            found["launches"] += event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
            found["replays"] += event.name == "cudaGraphLaunch"
            found["waits"] += event.name in WAITS
    return found


def learn(model: PreTrainedModel, batch: PackedBatch) -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        LogprobModel(model, uses_packed_attention=True, temperature=1.0)(batch)[0].sum().backward()


def main() -> None:
    """Count and print."""
    parser = script_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen1.5b")
    shape = SHAPES[parser.parse_args().shape]
    if not torch.cuda.is_available():
        raise ConfigError("gpu_counts.py counts on an NVIDIA GPU, which torch does not find here")
    configure(torch.device("cuda"))
    for groups in (1, 4, 8, 16):
        batch, launches = batch_of(groups, (5, 60)), []
        for layers in (1, 2):
            model = model_of(**SHAPES["tiny"] | {"num_hidden_layers": layers})
            learn(model, batch)
            launches.append(counted(lambda model=model, batch=batch: learn(model, batch))["launches"])  # type: ignore[misc]
        print(f"{groups} groups: {launches[1] - launches[0]} launches per layer")
    model = model_of(**shape)
    recompute_activations(model.train())
    batch = batch_of(max(1, TOKENS // (COMPLETIONS * 250)), (1, 500))
    learn(model, batch)
    torch.cuda.reset_peak_memory_stats()
    with Products() as products:
        learn(model, batch)
    print(f"update of {len(batch.input_ids_T)} tokens: {dict(counted(lambda: learn(model, batch)))}")
    print({str(dtype): f"{operations / 1e12:.1f} TFLOP" for dtype, operations in products.operations.items()})
    print(f"peak memory without an optimizer: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    model.zero_grad()
    model.gradient_checkpointing_disable()
    engine = build_engine("native", model.eval(), Tokenizer(), slots=256, uses_packed_attention=True)  # type: ignore[arg-type]
    plan, prompts = SamplingPlan(COMPLETIONS, LONGEST, 1.0, seed=0), [Prompt(i, "", (5,) * 100) for i in range(8)]

    def sample() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            engine.generate(prompts, plan)

    sample()
    found = counted(sample)
    print(f"rollout of {LONGEST} tokens: {dict(found)}; waits per token: {found['waits'] / LONGEST:.3f}")
    pools = sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0))
    print(f"memory of graphs: {pools / 2**30:.2f} GiB")


if __name__ == "__main__":
    run_main(main)
