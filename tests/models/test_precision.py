"""Mixed precision, selected by the accelerate config: bf16, and the loss scale of fp16 as far as a CPU computes it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo.config.parser import load_config
from grpo.config.schema import LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError, NumericsError
from grpo.kernels.attention import NAME, grpo_attention
from grpo.models.loading import load_model
from grpo.models.logprob_model import LogprobModel, probe_batch, use_grpo_attention
from grpo.models.strategies.registry import start_accelerator
from grpo.policy import Policy
from grpo.rollout.engine import build_engine
from grpo.rollout.logprob_mismatch import check_agreement
from grpo.trainer import train
from tests.fakes import tiny_data, tiny_folder

BATCH = probe_batch(42)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps the precision of the first Accelerator for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


def policy_of(folder: Path, accelerator: Accelerator, lora: bool = False, rate: float = 1e-6) -> Policy:
    adapter = LoraConfig(r=4) if lora else None
    return Policy(
        accelerator,
        str(folder),
        ModelConfig(name=str(folder)),
        ObjectiveConfig(beta=0.04),
        OptimizerConfig(learning_rate=rate),
        adapter,
        temperature=1.0,
        optimizer_steps=100,
    )


def learn(policy: Policy, factor: float = 1.0) -> float:
    policy.backward(-policy.logprobs(BATCH)[0].mean() * factor)
    return policy.step()


def test_bf16_keeps_float32_masters_that_move_by_a_millionth(folder: Path) -> None:
    """Ten steps of 1e-6: weights held in bfloat16 would lose nearly all of them in rounding (relative step 2^-8)."""
    policy = policy_of(folder, Accelerator(cpu=True, mixed_precision="bf16"))
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}
    before = {name: parameter.clone() for name, parameter in policy.model.named_parameters()}
    for _ in range(10):
        learn(policy)
    moved = sum(int((parameter != before[name]).sum()) for name, parameter in policy.model.named_parameters())
    rounded = sum(int((p.bfloat16() != before[name].bfloat16()).sum()) for name, p in policy.model.named_parameters())
    weights = sum(parameter.numel() for parameter in policy.model.parameters())
    unused = 42 - len(set(BATCH.input_ids_T.tolist()))  # rows of the embedding that no token of the batch looks up
    assert moved > 0.99 * (weights - unused * policy.model.config.hidden_size)
    assert rounded < 0.2 * weights
    moments = [state["exp_avg"].dtype for state in policy.optimizer.state.values()]
    assert set(moments) == {torch.float32}


def of_wrong_sign(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object, **more: object
) -> object:
    return grpo_attention(module, query, key, -value, *rest, **more)  # type: ignore[arg-type]


def test_a_model_kept_in_bf16_takes_our_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed attention is as close to float32 as the model's own, with different rounding in eight layers.

    A wrong implementation is detected.
    """
    shape = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2}
    folder = str(tiny_folder(tmp_path / "deep", **shape))
    exact, model = load_model(folder), load_model(folder, ModelConfig(torch_dtype="bfloat16"))
    with torch.no_grad():
        truth = LogprobModel(exact, uses_packed_attention=False, temperature=1.0)(BATCH)[0]
        plain = LogprobModel(model, uses_packed_attention=False, temperature=1.0)(BATCH)[0]
        assert use_grpo_attention(model)
        ours = LogprobModel(model, uses_packed_attention=True, temperature=1.0)(BATCH)[0]
    assert float((ours - truth).abs().mean()) < 1.5 * float((plain - truth).abs().mean())
    model.set_attn_implementation("sdpa")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, of_wrong_sign)
    assert not use_grpo_attention(model)


def test_bf16_computes_the_layers_in_bf16_and_the_head_in_float32(folder: Path) -> None:
    policy = policy_of(folder, Accelerator(cpu=True, mixed_precision="bf16"))
    seen: dict[str, torch.dtype] = {}
    layer = policy.model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, given, made: seen.update(layer=made.dtype))
    with torch.no_grad():
        logprobs, entropies = policy.logprobs(BATCH)
        with policy.accelerator.autocast():
            logits = policy.model.get_output_embeddings()(torch.ones(1, 32, dtype=torch.bfloat16))
    assert seen["layer"] == torch.bfloat16
    assert (logprobs.dtype, entropies.dtype, logits.dtype) == (torch.float32, torch.float32, torch.float32)
    exact = LogprobModel(policy.model, uses_packed_attention=True, temperature=1.0)
    with torch.no_grad():
        difference = (exact(BATCH)[0] - logprobs).abs()
    assert 0 < float(difference.max()) < 0.2  # it is bfloat16, and no worse


def test_autocast_keeps_no_copies_of_trained_weights(folder: Path) -> None:
    policy, seen = policy_of(folder, Accelerator(cpu=True, mixed_precision="bf16")), list[bool]()
    policy.model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_cache_enabled()))
    policy.logprobs(BATCH)[0].sum().backward()
    assert seen and not any(seen)
    with policy.accelerator.autocast():  # engines read a weight at every token
        assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("lora", [False, True])
def test_sampler_and_scorer_use_the_same_rounded_weights(folder: Path, lora: bool) -> None:
    """The engine reads linear weights in bfloat16, equal to the masters cast by autocast."""
    policy = policy_of(folder, Accelerator(cpu=True, mixed_precision="bf16"), lora, rate=0.01)
    policy.check()  # the reference is in the same precision: KL 0 before the first step
    for _ in range(3):
        learn(policy)
    policy.refresh_sampler()
    projection = policy.sampler.model.layers[0].self_attn.q_proj.weight
    assert projection.dtype == torch.bfloat16
    assert policy.sampler.get_output_embeddings().weight.dtype == torch.float32
    if not lora:
        assert torch.equal(projection, policy.model.model.layers[0].self_attn.q_proj.weight.bfloat16())
    with policy.accelerator.autocast():
        engine = build_engine(
            "native", policy.sampler, load_tokenizer(str(folder)), slots=4, uses_packed_attention=True
        )
    assert check_agreement(engine, policy, 1.0) < 0.05


def test_an_engine_with_other_weights_or_another_temperature_is_found_at_the_start(
    tmp_path: Path, folder: Path
) -> None:
    policy = policy_of(folder, Accelerator(cpu=True))
    tokenizer = load_tokenizer(str(folder))
    other = load_model(str(tiny_folder(tmp_path / "other", seed=1)))
    wrong = build_engine("native", other, tokenizer, slots=4, uses_packed_attention=use_grpo_attention(other))
    with pytest.raises(NumericsError, match="the engine and the trainer disagree.*where rounding explains 0.001"):
        check_agreement(wrong, policy, 1.0)
    right = build_engine("native", policy.sampler, tokenizer, slots=4, uses_packed_attention=True)
    assert check_agreement(right, policy, 1.0) < 1e-5
    with pytest.raises(NumericsError, match="disagree"):
        check_agreement(right, policy, 0.7)


def settings(tmp_path: Path, run: str, **changes: object) -> list[str]:
    values = {
        "model.name": tmp_path / "model",
        "data.path": tmp_path / "data.jsonl",
        "data.system_prompt": "null",
        "run_dir": tmp_path / run,
        "steps": 3,
        "prompts_per_step": 3,
        "sampling.num_generations": 4,
        "sampling.max_completion_length": 8,
        "optimizer.learning_rate": 0.001,
        "eval_every": 0,
        "tracking.report_to": "[]",
        "scoring.workers": 0,
        "rewards": '{"tests.letters:count_letters": 1.0}',
    }
    return [f"--{key}={value}" for key, value in (values | changes).items()]


def test_a_bf16_run_logs_how_far_sampling_and_training_are_apart(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` sets only this variable."""
    tiny_data(tmp_path / "data.jsonl")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = train(load_config(settings(tmp_path, "run")))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    differences = [row["policy/sampling_logprob_difference"] for row in rows]
    assert all(0 < difference < 0.05 for difference in differences)
    assert abs(rows[0]["policy/kl"]) < 1e-3
    weights = load_file(run / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())  # masters, not copies


def test_fp16_on_a_cpu_is_refused_with_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigError, match='mixed_precision is fp16.*on the CPU: set it to bf16 or "no"'):
        start_accelerator()


def fp16(scale: float) -> Accelerator:
    """The setup of accelerate for fp16 on a GPU, which accelerate rejects on a CPU."""
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def test_fp16_scales_the_loss_not_the_gradient_that_is_used(folder: Path) -> None:
    plain = learn(policy_of(folder, Accelerator(cpu=True)))
    AcceleratorState._reset_state(reset_partial_state=True)
    policy = policy_of(folder, fp16(1024.0), rate=0.01)
    assert policy.sampler.model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    policy.refresh_sampler()
    policy.check()
    assert learn(policy) == pytest.approx(plain, rel=2e-2)  # unscaled before clipping
    with policy.accelerator.autocast():
        engine = build_engine(
            "native", policy.sampler, load_tokenizer(str(folder)), slots=4, uses_packed_attention=True
        )
    policy.refresh_sampler()
    assert check_agreement(engine, policy, 1.0) < 2e-2


def test_fp16_overflow_skips_the_step_halves_the_scale_and_is_saved(folder: Path) -> None:
    policy = policy_of(folder, fp16(2.0**20), rate=0.01)
    before = {name: parameter.clone() for name, parameter in policy.model.named_parameters()}
    learn(policy, factor=1e6)  # overflows in float16
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.model.named_parameters())
    assert policy.accelerator.scaler.get_scale() == 2.0**19
    assert policy.skipped_in_a_row == 0  # the scale is found this way: no fault
    tensors, state = policy.state_dict()
    assert state["loss_scale"]["scale"] == 2.0**19
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = policy_of(folder, fp16(2.0**10))
    resumed.load_state_dict({name: dict(group) for name, group in tensors.items()}, state)
    assert resumed.accelerator.scaler.get_scale() == 2.0**19


def test_fp16_that_overflows_with_no_scale_left_is_a_fault(folder: Path) -> None:
    policy = policy_of(folder, fp16(1.0), rate=0.01)
    for skipped in (1, 2):
        learn(policy, factor=float("nan"))
        assert policy.skipped_in_a_row == skipped
