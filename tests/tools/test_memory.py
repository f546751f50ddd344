"""Memory: the arithmetic by hand, and the simulation beside real tensors. Peaks of real runs: benchmarks/memory.py."""

from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from grpo.config.parser import load_config
from grpo.models.logprob_model import LogprobModel, use_grpo_attention
from grpo.models.strategies.base import Machine
from grpo.models.strategies.registry import machine_of
from grpo.tools.memory import LiveBytes, cache_per_slot, estimate, layer_period, simulate, step_batches
from tests.fakes import tiny_model
from tests.hybrids import hybrid

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--model.name=x",
    "--prompts_per_step=2",
    "--sampling.num_generations=4",
    "--sampling.max_completion_length=12",
]


@pytest.mark.parametrize("machine", [Machine(), Machine("fsdp2", 2)], ids=["one process", "shards"])
@pytest.mark.parametrize("extra", [[], ["--tokens_per_batch=64", "--data.max_prompt_length=16"]])
def test_fake_tensors_count_what_real_ones_take(extra: list[str], machine: Machine) -> None:
    config = load_config([*FLAGS, *extra])
    model = tiny_model().train()
    batches = step_batches(config, 6, machine.processes)
    batch = max(batches, key=lambda batch: len(batch.input_ids_T))
    first = len(batches) == 1 and machine.kind == "single"  # shards never hold the gradients of all layers whole
    if not first:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    live = LiveBytes()
    single = machine.kind == "single"  # sharded weights go through their modules
    logprob_model = LogprobModel(model, uses_packed_attention=True, temperature=1.0, uses_kernels=single)
    logprob_model.accumulate_grads_inplace = single
    with live:
        logprobs, _ = logprob_model(batch)
    with live:
        logprobs.sum().backward()
    real = live.peak - (4 * sum(parameter.numel() for parameter in model.parameters()) if first else 0)
    assert simulate(model, config, 6, machine).activations == pytest.approx(real, rel=0.05)


def test_what_stays_by_hand() -> None:
    config = load_config(FLAGS)
    model = tiny_model()
    size = sum(parameter.numel() for parameter in model.parameters())
    plain = {name: value * 2**30 for name, value in estimate(config, model, 6, Machine()).items()}
    assert (plain["weights"], plain["gradients"], plain["AdamW"], plain["reference"]) == pytest.approx(
        (4 * size, 4 * size, 8 * size, 4 * size)
    )
    assert plain["working copy"] == 0
    shards = {name: v * 2**30 for name, v in estimate(config, model, 6, Machine("fsdp2", 4, "bf16")).items()}
    assert (shards["weights"], shards["gradients"], shards["AdamW"]) == pytest.approx((size, size, 2 * size))
    gpus = {once: Machine("fsdp2", 4, "bf16", False, once) for once in (True, False)}
    start = {
        once: estimate(config, model, 6, gpu)["start: what is not sharded yet"] * 2**30 for once, gpu in gpus.items()
    }
    assert start[False] == pytest.approx(4 * size)
    assert start[True] == pytest.approx(4 * 64 * 32)  # the largest weight, of the feed-forward layers
    away = {n: v * 2**30 for n, v in estimate(config, model, 6, Machine("fsdp2", 4, "bf16", False, True, True)).items()}
    here = {n: v * 2**30 for n, v in estimate(config, model, 6, gpus[True]).items()}
    assert away["weights"] == away["gradients"] == away["AdamW"] == 0
    assert here["peak"] - away["peak"] == pytest.approx(size + size + 2 * size)  # the float32 shards of four processes
    narrow, wide = (cache_per_slot(config, model, 6, Machine("fsdp2", 4, p, False)) for p in ("bf16", "no"))
    assert wide == 2 * narrow  # the engine samples in the dtype of the run, whatever FSDP gathers
    zero = {name: v * 2**30 for name, v in estimate(config, model, 6, Machine("zero2", 4, "bf16")).items()}
    assert zero["weights"] == pytest.approx(2 * size + size)  # bfloat16 whole, float32 masters in four parts
    lora = {name: v * 2**30 for name, v in estimate(load_config([*FLAGS, "--lora.r=2"]), model, 6, Machine()).items()}
    assert lora["reference"] == 0 and lora["AdamW"] < plain["AdamW"] / 5


def test_checkpointing_and_short_batches_keep_less() -> None:
    model = tiny_model()
    whole = simulate(model, load_config(FLAGS), 6, Machine()).activations
    less = simulate(model, load_config([*FLAGS, "--model.gradient_checkpointing=true"]), 6, Machine()).activations
    short = ["--tokens_per_batch=40", "--data.max_prompt_length=16"]
    assert less < 0.8 * whole
    assert simulate(model, load_config([*FLAGS, *short]), 6, Machine()).activations < 0.8 * whole


def test_every_profile_says_what_kind_of_machine_it_is() -> None:
    kinds = {path.stem: machine_of(str(path)) for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert kinds["cpu"] == Machine("single", 1, "no", True)
    assert kinds["multi_gpu"] == Machine("ddp", 8, "bf16", False)
    assert kinds["multi_node_fsdp2"] == Machine("fsdp2", 16, "bf16", False, True)
    assert kinds["deepspeed_zero3"] == Machine("zero3", 8, "bf16", False)


def test_offloading_is_read_from_the_profile(tmp_path: Path) -> None:
    text = (ROOT / "accelerate_configs" / "fsdp2.yaml").read_text()
    path = tmp_path / "offloaded.yaml"
    path.write_text(text.replace("fsdp_offload_params: false", "fsdp_offload_params: true"))
    assert machine_of(str(path)) == Machine("fsdp2", 8, "bf16", False, True, True)


@pytest.mark.parametrize("family", ["qwen3_5_text", "jamba"])
def test_a_hybrid_is_simulated_with_the_layers_that_train(family: str) -> None:
    model, config = hybrid(family).train(), load_config(FLAGS)
    assert use_grpo_attention(model)
    batch = max(step_batches(config, 6, 1), key=lambda batch: len(batch.input_ids_T))
    logprob_model, live = LogprobModel(model, uses_packed_attention=True, temperature=1.0), LiveBytes()
    logprob_model.accumulate_grads_inplace = True
    with live:
        logprobs, _ = logprob_model(batch)
    with live:
        logprobs.sum().backward()
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert simulate(model, config, 6, Machine()).activations == pytest.approx(live.peak - gradients, rel=0.05)


def test_the_period_of_layers() -> None:
    def period(*kinds: str) -> int:
        return layer_period(PretrainedConfig(layer_types=list(kinds)))

    assert layer_period(PretrainedConfig()) == 1
    assert period("full_attention", "sliding_attention", "full_attention", "full_attention") == 1
    three_to_one = ["linear_attention"] * 3 + ["full_attention"]
    assert period(*three_to_one * 3) == 4 and period(*three_to_one, *three_to_one[:2]) == 4
    assert period("mamba", "mamba", "full_attention", "mamba", "full_attention") == 5
