"""LoRA: the reference without adapter, a working copy that never changes the base, and saved folders."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo.config.parser import load_config
from grpo.config.schema import LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError, NumericsError
from grpo.models.given_adapter import GivenAdapter, given_adapter, load_given_adapter
from grpo.models.loading import live_model, load_model
from grpo.models.logprob_model import probe_batch
from grpo.models.lora import adapter_disabled, add_adapter, delta_weight, load_adapter, lora_layers
from grpo.models.weights import WeightReader, WorkingCopy
from grpo.policy import Policy
from grpo.trainer import train
from tests.fakes import tiny_data, tiny_folder, tiny_model


def lora_policy(path: Path, targets: list[str] | None = None, **model: object) -> Policy:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets or ["all-linear"])
    return Policy(
        Accelerator(cpu=True),
        str(path),
        ModelConfig(name=str(path), **model),
        ObjectiveConfig(beta=0.04),
        OptimizerConfig(learning_rate=0.01),
        lora,
        temperature=1.0,
        optimizer_steps=10,
    )


def learn(policy: Policy, steps: int = 2) -> None:
    batch = probe_batch(policy.model.config.vocab_size)
    for _ in range(steps):
        policy.backward(-policy.logprobs(batch)[0].mean())
        policy.step()
        policy.refresh_sampler()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "down_proj"], ["embed_tokens"], ["lm_head", "v_proj"]])
def test_off_is_the_start_and_the_copy_is_the_policy(folder: Path, targets: list[str]) -> None:
    policy, batch = lora_policy(folder, targets), probe_batch(42)
    with torch.no_grad():
        start = policy.logprobs(batch)[0]
    policy.check()
    learn(policy)
    with torch.no_grad():
        after = policy.logprobs(batch)[0]
        reference = policy.reference_logprobs([batch])[0]
        from grpo.models.logprob_model import LogprobModel

        sampled = LogprobModel(policy.sampler, uses_packed_attention=True, temperature=1.0)(batch)[0]
    assert reference is not None
    assert torch.equal(reference, start)
    assert (after - start).abs().max() > 0.01
    assert torch.allclose(sampled, after, atol=2e-5)
    assert not list(lora_layers(policy.sampler))  # no wrapper of peft's: plain layers


def test_the_scale_of_an_adapter_by_hand() -> None:
    """lora_alpha / r times B A, or lora_alpha / sqrt(r) with rslora. No dropout."""
    for rank_scaled, scale in [(False, 6 / 4), (True, 6 / 2)]:
        model = tiny_model()
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_rslora=rank_scaled)
        add_adapter(model, config, base="base")
        for _, layer in lora_layers(model):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            torch.nn.init.normal_(b)
            assert torch.allclose(delta_weight(layer), scale * (b @ a), atol=1e-6)
            assert not any(isinstance(part, torch.nn.Dropout) and part.p for part in layer.lora_dropout.values())


def test_only_the_adapter_learns_and_the_copy_shares_what_it_can(folder: Path) -> None:
    policy = lora_policy(folder, ["q_proj"])
    before = {name: tensor.clone() for name, tensor in policy.strategy.full_weights(policy.model)}
    learn(policy)
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained)
    after = dict(policy.strategy.full_weights(policy.model))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)} == set(policy.working_copy.own)
    shared = policy.sampler.get_input_embeddings().weight
    assert shared.data_ptr() == policy.model.get_input_embeddings().weight.data_ptr()


def test_a_thousand_merges_drift_by_exactly_zero(folder: Path) -> None:
    policy = lora_policy(folder, torch_dtype="bfloat16")  # where merging in place drifts most
    learn(policy)
    base = {name: p.clone() for name, p in policy.model.named_parameters() if "lora_" not in name}
    merged = {name: p.clone() for name, p in policy.sampler.named_parameters()}
    for _ in range(1000):
        policy.refresh_sampler()
    assert all(torch.equal(base[name], p) for name, p in policy.model.named_parameters() if name in base)
    assert all(torch.equal(merged[name], p) for name, p in policy.sampler.named_parameters())


def test_merged_folder_and_adapter_folder_are_the_policy(folder: Path, tmp_path: Path) -> None:
    policy, batch = lora_policy(folder), probe_batch(42)
    learn(policy)
    policy.save(tmp_path / "run" / "final", load_tokenizer(str(folder)))
    with torch.no_grad():
        expected = policy.sampler(batch.rows()[0]).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
        assert torch.allclose(merged(batch.rows()[0]).logits, expected, atol=1e-5)
        again = load_adapter(load_model(str(folder)), tmp_path / "run" / "adapter")
        assert torch.allclose(again(batch.rows()[0]).logits, expected, atol=1e-5)
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (4, 8, str(folder))


def test_a_tied_head_as_target_is_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "tied")
    model = tiny_model(vocab_size=42, tie_word_embeddings=True)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path / "tied")
    with pytest.raises(ConfigError, match="takes in .*(lm_head|embed_tokens), whose weight is tied"):
        lora_policy(tmp_path / "tied", ["embed_tokens"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.load_in_4bit=true"], "load_in_4bit is true, but lora.r is not set"),
        (["--model.torch_dtype=bfloat16"], "torch_dtype is bfloat16, but lora.r is not set"),
        (["--lora.r=4", "--model.sync_ref_model=true"], "the reference is the adapter switched off, and cannot move"),
        (["--lora.r=0"], "lora.r is 0, needs at least 1"),
        (["--lora.r=4", "--lora.target_modules=[]"], "lora.target_modules is empty"),
        (["--objective.beta=0", "--model.sync_ref_model=true"], "objective.beta is 0, so no reference is ever used"),
    ],
)
def test_refused_before_weights(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(flags)


def test_targets_that_do_not_exist_are_told_what_does(folder: Path) -> None:
    with pytest.raises(ConfigError, match="This model's linear layers are down_proj, gate_proj"):
        lora_policy(folder, ["query"])


def test_4bit_without_bitsandbytes_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name))
    with pytest.raises(ConfigError, match="bitsandbytes is missing: pip install bitsandbytes"):
        lora_policy(folder, load_in_4bit=True)


def lora_run(place: Path, folder: Path, name: str, steps: int, **more: object) -> dict[str, torch.Tensor]:
    """Train briefly in place/name. Return the weights of the last checkpoint."""
    tiny_data(place / "data.jsonl")
    settings = {
        "model.name": folder,
        "data.path": place / "data.jsonl",
        "data.system_prompt": "null",
        "run_dir": place / name,
        "lora.r": 4,
        "steps": steps,
        "prompts_per_step": 3,
        "sampling.num_generations": 4,
        "sampling.max_completion_length": 8,
        "optimizer.learning_rate": 0.01,
        "optimizer.lr_scheduler_type": "constant",
        "eval_every": 0,
        "save_every": 1,
        "tracking.report_to": "[]",
        "rewards": '{"tests.letters:count_letters": 1.0}',
    } | more
    train(load_config([f"--{key}={value}" for key, value in settings.items()]))
    return load_file(place / name / "checkpoints" / f"step-{steps}" / "model.safetensors")


def test_resume_is_exact_with_an_adapter(tmp_path: Path, folder: Path) -> None:
    whole = lora_run(tmp_path, folder, "whole", 3)
    lora_run(tmp_path, folder, "part", 1)
    resumed = lora_run(tmp_path, folder, "part", 3, resume="auto")
    assert whole.keys() == resumed.keys()
    assert all("lora_" in name for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(ConfigError, match="resume with the lora"):
        lora_run(tmp_path, folder, "part", 4, resume="auto", **{"lora.r": "null"})


def test_merged_layers_get_the_dtype_that_zero2_gives_the_live_ones(folder: Path) -> None:
    model = load_model(str(folder))
    copied = WorkingCopy(model, WeightReader())
    add_adapter(model, LoraConfig(r=4), base="")
    copied.bind(model, torch.device("cpu"), compute_dtype=None, live_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in copied.own.values()} == {torch.bfloat16}


def test_a_merge_that_is_wrong_ends_the_run_at_its_first_step(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a layer that the check at the start misses: the merge adds the double. An adapter of 0 hides it."""
    monkeypatch.setattr("grpo.policy.check_merge", lambda *_: None)
    monkeypatch.setattr("grpo.models.weights.delta_weight", lambda layer: 2 * delta_weight(layer))
    source = "def by_index(completions, **_):\n    return [float(i % 3) for i in range(len(completions))]\n"
    (tmp_path / "mine.py").write_text(source)  # no group is flat, so the first step moves the adapter
    extra = {"rewards": f'{{"{tmp_path}/mine.py:by_index": 1.0}}', "scoring.workers": 0}
    with pytest.raises(
        NumericsError, match=r"difference is .* in step 1 \(rounding explains 0.001\): .*lora.target_mod"
    ):
        lora_run(tmp_path, folder, "wrong", 3, **extra)
    assert not (tmp_path / "wrong" / "checkpoints").exists()
    rows = [json.loads(line) for line in (tmp_path / "wrong" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] and rows[0]["policy/sampling_logprob_difference"] < 1e-5
    lora_run(tmp_path, folder, "allowed", 1, **extra, **{"rollout.max_logprob_difference": 10})


def test_an_adapter_that_was_trained_before_is_the_start_and_the_reference(folder: Path) -> None:
    import peft

    model = load_model(str(folder))
    given = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3)
    ids = torch.tensor([[3, 5, 7]])
    expected, adapter = model(ids).logits.detach(), GivenAdapter(given, "default")
    with live_model(str(folder), model), given_adapter(str(folder), adapter):
        policy = lora_policy(folder, ["q_proj", "v_proj"])
    assert policy.model is model and torch.allclose(model(ids).logits, expected, atol=1e-6)
    policy.check()
    batch = probe_batch(42)
    [start] = policy.old_logprobs([batch])
    with adapter_disabled(policy.adapter):
        assert not torch.allclose(policy.old_logprobs([batch])[0], start, atol=1e-3)
    learn(policy)
    now, moved = {n: p.detach().clone() for n, p in model.named_parameters()}, policy.old_logprobs([batch])[0]
    assert torch.equal(policy.reference_logprobs([batch])[0], start) and not torch.allclose(moved, start, atol=1e-3)
    assert all(torch.equal(value, now[name]) for name, value in model.named_parameters())
    with pytest.raises(ConfigError, match="4 weights, of which a new one with its settings has others"):
        load_given_adapter(model, dict(list(adapter.weights.items())[:4]))


def test_a_merged_adapter_leaves_the_base_as_it_was(folder: Path) -> None:
    import peft

    model = load_model(str(folder))
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    given = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"]), adapter_name="mine")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.fill_(0.5)
    given.merge_adapter()
    adapter = GivenAdapter(given, "mine")
    taken = adapter.take_off()
    assert adapter.take_off() is taken and all(name.endswith(".default.weight") for name in taken)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, plain[name], atol=1e-6), name
