"""What TRL's own tests of GRPOTrainer expect, as far as it applies here: docs/trl.md lists them by name.

Each test trains a tiny model for a few steps through TRL's interface, and checks the value that shows the feature.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config

from grpo import GRPOTrainer
from grpo.compat.expectations import EXPECTATIONS
from grpo.errors import ConfigError
from grpo.models.logprob_model import probe_batch
from tests.compat.rewards import by_length, count_a
from tests.compat.test_trainer import ROWS, arguments
from tests.fakes import save_tokenizer, tiny_folder

Dataset = pytest.importorskip("datasets").Dataset
pytestmark = pytest.mark.slow
CHATS = [{"prompt": [{"role": "user", "content": row["prompt"]}], "n": row["n"]} for row in ROWS]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model with a tokenizer of its own."""
    path = tmp_path_factory.mktemp("judge")
    size = save_tokenizer(path)
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=size, num_key_value_heads=2, num_labels=1, pad_token_id=1, **shape)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    return str(path)


def run(folder: str, path: Path, rewards: Any, rows: list[dict] = ROWS, **fields: Any) -> tuple[GRPOTrainer, dict]:
    """Train, and return the trainer and the weights before."""
    names = ("processing_class", "peft_config", "reward_processing_classes", "eval_dataset", "model")
    own = {name: fields.pop(name) for name in list(fields) if name in names}
    model = own.pop("model", folder)
    settings = {"learning_rate": 0.1, "max_steps": 3} | fields
    trainer = GRPOTrainer(model, rewards, arguments(path, **settings), Dataset.from_list(rows), **own)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] is not None
    return trainer, before


def changed(trainer: GRPOTrainer, before: dict) -> list[str]:
    """Return the names of the parameters that training has changed."""
    now = dict(trainer.model.named_parameters())
    return [name for name, value in before.items() if not torch.equal(value, now[name])]


def test_the_page_counts_what_is_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8") + Path(__file__).with_name("test_trainer.py").read_text()
    here += Path(__file__).with_name("test_arguments.py").read_text()
    for row in EXPECTATIONS:
        assert (row.test is None) == bool(row.reason), row.name
        assert row.test is None or "/" in row.test or f"def {row.test}(" in here, row.test


def test_only_model_reward_and_data_are_needed(folder: str, judge: str, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = GRPOTrainer(folder, judge, train_dataset=Dataset.from_list(ROWS))
    assert trainer.args.output_dir == f"{Path(folder).name}-GRPO" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["text", "chat"])
def test_training_changes_every_weight(folder: str, judge: str, tmp_path: Path, rows: list[dict]) -> None:
    """With a reward model that is another model with its own tokenizer and template."""
    tokenizers = []
    for path in (folder, judge):
        tokenizers.append(AutoTokenizer.from_pretrained(path))
        tokenizers[-1].chat_template = TEMPLATE
    own = {"processing_class": tokenizers[0], "reward_processing_classes": tokenizers[1]}
    trainer, before = run(folder, tmp_path / "out", judge, rows, **own)
    assert changed(trainer, before) == list(before)
    name = Path(judge).name
    rollouts = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    for row in rollouts[:4]:
        ids = tokenizers[1](row["prompt"] + row["completion"], return_tensors="pt", add_special_tokens=False)
        assert row["rewards"][name] == pytest.approx(float(model(**ids).logits[0, 0]), abs=1e-5)


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"])
def test_losses(folder: str, tmp_path: Path, loss: str) -> None:
    trainer, before = run(folder, tmp_path / "out", by_length, loss_type=loss, gradient_accumulation_steps=2)
    assert len(changed(trainer, before)) == len(before) and trainer.config.prompts_per_step == 2


def test_evaluation_while_training(folder: str, tmp_path: Path) -> None:
    fields = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "num_generations_eval": 1}
    trainer, _ = run(folder, tmp_path / "out", by_length, eval_dataset=Dataset.from_list(ROWS[:2]), **fields)
    assert [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry] == [0, 2, 3]


def test_several_passes_and_a_sequence_level_ratio(folder: str, tmp_path: Path) -> None:
    fields = {"num_iterations": 2, "max_steps": 4, "importance_sampling_level": "sequence"}
    trainer, before = run(folder, tmp_path / "out", by_length, **fields)
    assert changed(trainer, before) == list(before) and trainer.state.global_step == 4
    assert trainer.config.objective.importance_sampling_level == "sequence"


@pytest.mark.parametrize("recompute", [False, True])
def test_an_adapter_trains_alone(folder: str, tmp_path: Path, recompute: bool) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fields = {"model": model, "peft_config": LoraConfig(), "gradient_checkpointing": recompute}
    trainer, before = run(folder, tmp_path / "out", by_length, **fields)
    assert isinstance(trainer.model, PeftModel)
    moved = changed(trainer, before)
    assert moved == [name for name in before if "lora_" in name]  # peft's default: q_proj and v_proj
    assert {name.split(".")[-4] for name in moved} == {"q_proj", "v_proj"}
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig())
    with pytest.raises(ConfigError, match="model has an adapter already: leave out peft_config"):
        GRPOTrainer(adapted, by_length, arguments(tmp_path / "o"), Dataset.from_list(ROWS), peft_config=LoraConfig())


@pytest.mark.parametrize("bf16", [False, True])
def test_an_adapter_that_exists_is_trained_on(folder: str, tmp_path: Path, bf16: bool) -> None:
    """The reference is the model with the adapter as it was given, as in TRL: the KL starts at 0."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    given = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), adapter_name="mine")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in given.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.2)
    merged = {name: value.detach().clone() for name, value in given.named_parameters() if "lora_" in name}
    trainer, before = run(folder, tmp_path / "out", by_length, model=given, beta=0.1, bf16=bf16)
    assert isinstance(trainer.model, PeftModel) and trainer.ref_model is None
    lora = {name.replace(".default.", ".mine."): value for name, value in before.items() if "lora_" in name}
    assert lora.keys() == merged.keys() and all(torch.equal(lora[name], value) for name, value in merged.items())
    assert changed(trainer, before) == [name for name in before if "lora_" in name]
    for name, value in base.named_parameters():  # the weights of the base are as they were, and in their place
        if ".lora_" not in name:
            assert torch.equal(value, plain[name.replace(".base_layer", "")])
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == 0 and kl[-1] > 0
    policy = trainer._run.policy  # type: ignore[union-attr]
    [batch] = [probe_batch(10)]
    with policy.strategy.autocast():
        found = policy.reference.logprobs([batch])[0]  # type: ignore[union-attr]
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "lora_" in name:
                value.copy_(merged[name.replace(".default.", ".mine.")])
    assert torch.equal(found, policy.old_logprobs([batch])[0])
    adapters = {"a": LoraConfig(r=2, target_modules=["q_proj"]), "b": LoraConfig(r=2, target_modules=["q_proj"])}
    several = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), adapters["a"], adapter_name="a")
    several.add_adapter("b", adapters["b"])
    with pytest.raises(ConfigError, match=r"model has the adapters \['a', 'b'\]"):
        GRPOTrainer(several, by_length, arguments(tmp_path / "o"), Dataset.from_list(ROWS))


@pytest.mark.parametrize("fields", [{"use_liger_kernel": True}, {"use_transformers_paged": True}])
@pytest.mark.parametrize("adapter", [False, True])
def test_kernels_of_others_are_not_needed(folder: str, tmp_path: Path, fields: dict, adapter: bool) -> None:
    """A loaded model trains with these fields, which have no effect here, also with the off-policy mask."""
    from peft import LoraConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"off_policy_mask_threshold": 0.5, "logging_strategy": "no", "eval_dataset": Dataset.from_list(ROWS[:2])}
    own = {"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])} if adapter else {}
    trainer, before = run(folder, tmp_path / "out", by_length, model=model, **settings, **own, **fields)
    assert changed(trainer, before) == [name for name in before if "lora_" in name or not adapter]
    assert not any("loss" in entry for entry in trainer.state.log_history)


def test_several_rewards_of_every_kind_with_weights(folder: str, judge: str, tmp_path: Path) -> None:
    async def unique(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(set(completion))) for completion in completions]

    def none(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    def near(completions: list[str], n: list[int], trainer_state: Any, **columns: Any) -> list[float]:
        assert trainer_state.global_step < 3
        return [float(abs(len(completion) - value)) for completion, value in zip(completions, n, strict=True)]

    rewards = [count_a, unique, none, near, judge]
    weights = [0.7, 0.3, 1.0, 0.2, 0.5]
    trainer, before = run(folder, tmp_path / "out", rewards, reward_weights=weights, logging_steps=10)
    assert changed(trainer, before) == list(before)
    last = trainer.state.log_history[-1]
    names = ["count_a", "unique", "none", "near", Path(judge).name]
    for name in names:
        assert (f"rewards/{name}/mean" in last) == (name != "none")
    rollouts = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    for row in rollouts:
        values = [row["rewards"][name] for name in names]
        total = sum(w * value for w, value in zip(weights, values, strict=True) if value is not None and value == value)
        assert row["reward"] == pytest.approx(total)


def test_rewards_normalised_before_they_are_summed(folder: str, tmp_path: Path) -> None:
    fields = {"multi_objective_aggregation": "normalize_then_sum"}
    trainer, before = run(folder, tmp_path / "out", [count_a, by_length], **fields)
    assert changed(trainer, before) == list(before)


@pytest.mark.parametrize("scale", [False, "group", "batch", True, "none"])
def test_scaling_of_rewards(folder: str, tmp_path: Path, scale: Any) -> None:
    run(folder, tmp_path / "out", by_length, scale_rewards=scale, gradient_accumulation_steps=2, max_steps=1)
    rollouts = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    rewards = torch.tensor([row["reward"] for row in rollouts], dtype=torch.float64).reshape(2, 4)
    expected = rewards - rewards.mean(1, keepdim=True)
    if scale in (True, "group"):
        expected = expected / (rewards.std(1, keepdim=True) + 1e-4)
    if scale == "batch":
        expected = expected / (rewards.std() + 1e-4)
    found = torch.tensor([row["advantage"] for row in rollouts], dtype=torch.float64).reshape(2, 4)
    assert torch.allclose(found, expected, atol=1e-9)


def test_a_reference_with_and_without_sync(folder: str, tmp_path: Path) -> None:
    trainer, before = run(folder, tmp_path / "out", by_length, beta=0.1)
    assert changed(trainer, before) == list(before)
    for name, value in trainer.ref_model.named_parameters():
        assert torch.equal(value, before[name.removeprefix("model.") if name not in before else name])
    assert [entry["kl"] for entry in trainer.state.log_history if "kl" in entry][1] > 0
    synced, before = run(folder, tmp_path / "synced", by_length, beta=0.1, sync_ref_model=True, ref_model_sync_steps=2)
    moved = [not torch.equal(v, before[n]) for n, v in synced.ref_model.named_parameters() if n in before]
    assert moved and all(moved)


def test_entropy_filter_and_off_policy_mask(folder: str, tmp_path: Path) -> None:
    filtered, before = run(folder, tmp_path / "filtered", by_length, top_entropy_quantile=0.2)
    assert changed(filtered, before) == list(before) and filtered.config.objective.top_entropy_quantile == 0.2
    masked, before = run(folder, tmp_path / "masked", by_length, off_policy_mask_threshold=0.5)
    assert changed(masked, before) == list(before) and masked.config.objective.off_policy_mask_threshold == 0.5


def test_truncated_completions_alone_change_nothing(folder: str, tmp_path: Path) -> None:
    fields = {"mask_truncated_completions": True, "max_completion_length": 1, "max_steps": 1}
    for seed in range(8):  # until no completion ends with its only token
        trainer, before = run(folder, tmp_path / str(seed), by_length, seed=seed, **fields)
        rollouts = [json.loads(line) for line in (tmp_path / str(seed) / "rollouts.jsonl").read_text().splitlines()]
        if not any(row["ended"] for row in rollouts):
            break
    assert not any(row["ended"] for row in rollouts) and changed(trainer, before) == []


def test_rewards_that_never_apply_are_reported(folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def none(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    with caplog.at_level(logging.INFO, logger="grpo"):
        trainer, before = run(folder, tmp_path / "out", none, max_steps=12)
    assert changed(trainer, before) == [] and "finding" in caplog.text


def test_groups_larger_than_a_micro_batch_double_clip_and_template(folder: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% if plain %}{{ messages[0]['content'] }}{% else %}?{% endif %}"
    fields = {"per_device_train_batch_size": 3, "num_generations": 6, "gradient_accumulation_steps": 2, "delta": 2.0}
    own = {"processing_class": tokenizer, "chat_template_kwargs": {"plain": True}, "dataloader_num_workers": 2}
    trainer, before = run(folder, tmp_path / "out", by_length, CHATS, **fields, **own)
    assert changed(trainer, before) == list(before) and trainer.config.objective.delta == 2.0
    rollouts = (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()
    assert len(rollouts) == 3 * 6


def test_rows_in_their_own_order(folder: str, tmp_path: Path) -> None:
    fields = {"shuffle_dataset": False, "num_iterations": 2, "gradient_accumulation_steps": 3, "max_steps": -1}
    trainer, _ = run(folder, tmp_path / "out", by_length, num_train_epochs=2, **fields)
    rollouts = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in rollouts if row["sample"] == 0]
    assert prompts == [row["prompt"] for row in ROWS] * 2  # 3 prompts a step, 4 steps an epoch
    assert trainer.state.global_step == 16 and trainer.state.epoch == 2


def test_wrong_numbers_of_tokenizers(folder: str, judge: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(judge)
    data, args = Dataset.from_list(ROWS), arguments(tmp_path / "out")
    with pytest.raises(ConfigError, match="reward_processing_classes has 1 entries"):
        GRPOTrainer(folder, [judge, judge], args, data, reward_processing_classes=tokenizer)
    trainer = GRPOTrainer(folder, [judge, judge], args, data, reward_processing_classes=[tokenizer, tokenizer])
    assert list(trainer.config.rewards) == [f"model:{Path(judge).name}", f"model:{Path(judge).name}_2"]


def test_the_head_is_in_float32_in_mixed_precision(folder: str, tmp_path: Path) -> None:
    trainer, before = run(folder, tmp_path / "out", by_length, bf16=True, cast_lm_head_to_fp32=True)
    assert changed(trainer, before) == list(before) and trainer.model.lm_head.weight.dtype == torch.float32
