"""GRPOTrainer: TRL's constructor, methods and events on this trainer's own run. Every test trains a tiny model."""

import asyncio
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    Qwen2Config,
    TrainerCallback,
)
from transformers.trainer_utils import TrainOutput

import grpo
from grpo import GRPOConfig, GRPOTrainer
from grpo.compat.logs import completion_logs, evaluation_logs, merged
from grpo.compat.rewards import reward_model_function, rewards_of
from grpo.errors import ConfigError, StorageError
from tests.compat.rewards import constant, count_a
from tests.fakes import SHAPE, tiny_folder

datasets = pytest.importorskip("datasets")
Dataset, IterableDataset = datasets.Dataset, datasets.IterableDataset
ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"{a}+{a}=", "n": a} for a in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("model")))


def arguments(path: Path, **fields: Any) -> GRPOConfig:
    small = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return GRPOConfig(str(path), **(small | fields))


def trained(folder: str, path: Path, **fields: Any) -> GRPOTrainer:
    own = {name: fields.pop(name) for name in list(fields) if name in ("callbacks", "eval_dataset", "peft_config")}
    reward = fields.pop("reward_funcs", count_a)
    trainer = GRPOTrainer(folder, reward, arguments(path, **fields), Dataset.from_list(ROWS), **own)
    trainer.train()
    return trainer


def losses(trainer: GRPOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Log names, by hand

SCORED = [
    {"draw": 0, "length": 2, "ended": True, "reward": 1.0, "rewards": {"a": 1.0, "b": math.nan}},
    {"draw": 0, "length": 4, "ended": False, "reward": 1.0, "rewards": {"a": 1.0, "b": 3.0}},
    {"draw": 1, "length": 6, "ended": True, "reward": 0.0, "rewards": {"a": 0.0, "b": 1.0}},
    {"draw": 1, "length": 8, "ended": True, "reward": 4.0, "rewards": {"a": 4.0, "b": 2.0}},
]


def test_completion_logs_by_hand() -> None:
    logs = completion_logs(SCORED)
    assert [logs[f"completions/{name}_length"] for name in ("mean", "min", "max")] == [5, 2, 8]
    assert logs["completions/mean_terminated_length"] == 16 / 3 and logs["completions/min_terminated_length"] == 2
    assert logs["reward"] == 1.5 and logs["reward_std"] == pytest.approx(math.sqrt((0.25 + 0.25 + 2.25 + 6.25) / 3))
    assert logs["rewards/b/mean"] == 2.0 and logs["rewards/b/std"] == 1.0  # 3, 1, 2
    assert logs["frac_reward_zero_std"] == 0.5


def test_evaluation_logs_and_means_by_hand() -> None:
    logs = evaluation_logs(SCORED, {"a": 1.0, "b": 0.5}, "eval_x")
    assert logs["eval_x_reward"] == 1.5 + 0.5 * 2.0 and logs["eval_x_completions/clipped_ratio"] == 0.25
    entries = [{"loss": 1.0, "learning_rate": 2.0, "kl": 1.0}, {"loss": 3.0, "learning_rate": 1.0}]
    assert merged(entries) == {"loss": 2.0, "learning_rate": 1.0, "kl": 1.0}


# Rewards


def test_names_of_rewards() -> None:
    def inner(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    found = rewards_of(["accuracy", count_a, inner, inner, lambda completions: [1.0]], [1, 2, 3, 4, 5], None)
    here = "tests.compat.test_trainer"
    names = ["accuracy", "tests.compat.rewards:count_a", f"{here}:inner", f"{here}:inner_2", f"{here}:<lambda>"]
    assert found.weights == dict(zip(names, [1.0, 2.0, 3.0, 4.0, 5.0], strict=True))
    assert list(found.live) == names[2:]  # other processes find the first two by their names


def test_rewards_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="reward_weights has 1 entries, needs one for each of the 2"):
        rewards_of([count_a, count_a], [1.0], None)
    with pytest.raises(ConfigError, match="reward_funcs is empty"):
        rewards_of(None, None, None)
    with pytest.raises(ConfigError, match=r"reward_funcs has 7 \(int\)"):
        rewards_of([7], None, None)


def test_a_reward_model_is_its_first_logit(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = Qwen2Config.from_pretrained(folder, num_labels=1)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    score = reward_model_function(model, tokenizer, "judge")
    prompts, completions = ["1+1=", "2+"], ["2", "2=4 yes"]
    found = score(prompts=prompts, completions=completions)
    for value, prompt, completion in zip(found, prompts, completions, strict=True):  # one at a time: no padding
        alone = tokenizer(prompt + completion, return_tensors="pt", add_special_tokens=False)
        assert value == pytest.approx(float(model(**alone).logits[0, 0]), abs=1e-5)


# Bad input, before any weight loads


def test_bad_input_is_refused_before_weights_load(folder: str, tmp_path: Path) -> None:
    data, args = Dataset.from_list(ROWS), arguments(tmp_path / "out")
    for given, message in [
        ({"train_dataset": None}, "train_dataset is missing"),
        ({"train_dataset": "gsm8k"}, "train_dataset is a str"),
        ({"train_dataset": [{"text": "a"}]}, "row 1: there is no column 'prompt'"),
        ({"train_dataset": [{"prompt": "a", "image": "b"}]}, "prompts must be text"),
        ({"tools": [count_a]}, "tools: 'count_a' has no schema"),
        ({"rollout_func": count_a}, "rollout_func is not supported"),
        ({"model": 7}, "model is a int"),
        ({"args": arguments(tmp_path / "out", eval_strategy="steps")}, "eval_dataset is missing"),
    ]:
        everything = {"model": folder, "reward_funcs": count_a, "args": args, "train_dataset": data}
        with pytest.raises(ConfigError, match=message):
            GRPOTrainer(**(everything | given))
    with pytest.raises(TypeError, match="callbacks has a int"):
        GRPOTrainer(folder, count_a, args, data, callbacks=[7])
    with pytest.raises(ConfigError, match="needs the column 'answer'"):
        GRPOTrainer(folder, lambda completions, answer: [0.0], args, data).train()
    assert not (tmp_path / "out").exists()


# Training


class Watcher(TrainerCallback):
    """Notes every event, and stops after `stop_after` optimizer steps."""

    def __init__(self, stop_after: int = 10**6, save_at: int = -1):
        self.events: list[str] = []
        self.stop_after, self.save_at = stop_after, save_at

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        self.events.append(f"begin {state.max_steps} {model.config.model_type}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.events.append(f"step {state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> Any:
        self.events.append(f"done {state.global_step}")
        control.should_training_stop = state.global_step >= self.stop_after
        control.should_save = state.global_step == self.save_at
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        self.events.append(f"log {state.global_step}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **given: Any) -> None:
        self.events.append(f"evaluate {sorted(metrics)[-1]}")

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.events.append(f"save {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.events.append(f"end {state.global_step}")


@pytest.mark.slow
def test_events_history_and_files(folder: str, tmp_path: Path) -> None:
    watcher = Watcher()
    sets = {"x": Dataset.from_list(ROWS[:2]), "y": Dataset.from_list(ROWS[:3])}
    trainer = trained(
        folder,
        tmp_path / "out",
        max_steps=4,
        num_iterations=2,
        logging_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        eval_dataset=sets,
        callbacks=[watcher],
    )
    assert watcher.events == [
        *("begin 4 qwen2", "log 0", "evaluate eval_y_rewards/count_a/mean", "step 0", "done 2", "save 2"),
        *("step 2", "done 4", "log 4", "log 4", "evaluate eval_y_rewards/count_a/mean", "save 4", "log 4", "end 4"),
    ]
    assert trainer.state.global_step == 4 and trainer.state.epoch == pytest.approx(4 / 24)
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert entry["loss"] == pytest.approx(fmean(row["policy/loss"] / 2 for row in rows[1:]))
    assert entry["rewards/count_a/mean"] == pytest.approx(fmean(row["reward/count_a/mean"] for row in rows[1:]))
    rollouts = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    first = [row["reward"] for row in rollouts if row["step"] == 1]
    assert rows[1]["reward_std"] == pytest.approx(stdev(first))  # TRL's names are in the files and trackers, too
    assert rows[1]["completions/mean_length"] == rows[1]["rollout/length_mean"]
    again = trainer.evaluate()
    assert again["eval_reward"] == rows[-1]["eval_reward"] == rows[-1]["eval/reward/count_a/mean"]
    assert again["eval_y_reward"] == rows[-1]["eval_y_reward"]
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(saved.lm_head.weight, trainer.model.lm_head.weight)
    trainer.save_state()
    trainer.save_metrics("eval", again)
    trainer.create_model_card(model_name="mine", dataset_name="sums", tags=["a"])
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 4
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_reward"] == again["eval_reward"]
    assert "datasets: sums" in (tmp_path / "out" / "README.md").read_text()
    predicted = trainer.predict(Dataset.from_list(ROWS[:3]))
    assert len(predicted.predictions) == 3 * 4  # num_generations for each row
    assert predicted.metrics["test_reward"] == pytest.approx(fmean(count_a(predicted.predictions)))


@pytest.mark.slow
def test_push_to_hub_says_what_failed(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(folder, tmp_path / "out", hub_model_id="me/mine")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(StorageError, match="cannot push .*final to me/mine"):
        trainer.push_to_hub(token="none")


@pytest.mark.slow
def test_a_callback_stops_saves_and_its_error_ends_the_training(folder: str, tmp_path: Path) -> None:
    watcher = Watcher(stop_after=2, save_at=1)
    trainer = trained(folder, tmp_path / "out", max_steps=5, callbacks=[watcher])
    assert trainer.state.global_step == 2 and "save 1" in watcher.events and watcher.events[-1] == "end 2"

    class Asking(TrainerCallback):
        """Asks for everything once, each in another event."""

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            assert not (control.should_evaluate or control.should_save)
            control.should_evaluate = state.global_step == 2
            control.should_log = state.global_step == 3

        def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            control.should_save = state.global_step == 3

        def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            control.should_save = state.global_step == 2

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            control.should_training_stop = state.global_step == 3

    for strategy in ("steps", "no"):  # with prompts of the run's own, and without
        watcher, out = Watcher(), tmp_path / f"asking-{strategy}"
        fields = {"max_steps": 6, "logging_steps": 100, "eval_strategy": strategy, "eval_steps": 100}
        sets = Dataset.from_list(ROWS[:2])
        trainer = trained(folder, out, callbacks=[watcher, Asking], eval_dataset=sets, **fields)
        done = [event for event in watcher.events if event.split()[0] not in ("begin", "step", "end")]
        evaluated = ["log 2", "evaluate eval_rewards/count_a/mean", "save 2"]
        start = ["log 0", "evaluate eval_rewards/count_a/mean"] if strategy == "steps" else []
        assert done == [
            *start,
            "done 1",
            "done 2",
            *evaluated,
            "done 3",
            "log 3",
            "save 3",
            "done 4",
            "save 4",
            "log 4",
        ]
        assert trainer.state.global_step == 4
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        [found] = [row for row in rows if row["step"] == 2]
        [entry] = [row for row in trainer.state.log_history if row["step"] == 2]
        assert found["eval_reward"] == entry["eval_reward"]

    class Failing(TrainerCallback):
        def on_step_end(self, *given: Any, **more: Any) -> None:
            raise ZeroDivisionError("in a callback")

    with pytest.raises(ZeroDivisionError, match="in a callback"):
        trained(folder, tmp_path / "failing", max_steps=5, callbacks=[Failing])


@pytest.mark.slow
def test_early_stopping_counts_on_after_a_resume(folder: str, tmp_path: Path) -> None:
    """transformers' EarlyStoppingCallback, with a metric that never gets better than at the start."""
    fields = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_reward", "learning_rate": 0.0}
    fields |= {"save_steps": 2, "num_generations_eval": 2, "restore_callback_states_from_checkpoint": True}
    own = {"eval_dataset": Dataset.from_list(ROWS[:2]), "reward_funcs": constant, "lr_scheduler_type": "constant"}
    trained(folder, tmp_path / "out", max_steps=2, callbacks=[EarlyStoppingCallback(4)], **own, **fields)
    args = arguments(tmp_path / "out", max_steps=9, lr_scheduler_type="constant", **fields)
    stopping = EarlyStoppingCallback(4)
    data = Dataset.from_list(ROWS)
    resumed = GRPOTrainer(folder, constant, args, data, Dataset.from_list(ROWS[:2]), callbacks=[stopping])
    resumed.train(resume_from_checkpoint=True)
    # Evaluations at 0 (the best), 1, 2; after the resume 3, 4: the fourth without a better one.
    assert resumed.state.global_step == 4 and stopping.early_stopping_patience_counter == 4
    assert resumed.state.best_metric == 1.0 and resumed.state.best_global_step == 0


@pytest.mark.slow
def test_every_kind_of_model_and_reward_trains_the_same(folder: str, tmp_path: Path) -> None:
    expected = losses(trained(folder, tmp_path / "id", max_steps=3))
    assert any(expected)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = model.lm_head.weight.clone()

    async def slow_count(completions: list[str], n: list[int], **columns: Any) -> list[float]:
        await asyncio.sleep(0)
        assert len(n) == len(completions)
        return count_a(completions)

    data = Dataset.from_list(ROWS)
    args = arguments(tmp_path / "loaded", max_steps=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loaded = GRPOTrainer(model, [slow_count], args, data, optimizers=(optimizer, None))
    result = loaded.train()
    assert isinstance(result, TrainOutput) and result.training_loss == pytest.approx(fmean(expected), abs=1e-7)
    assert losses(loaded) == pytest.approx(expected, abs=1e-7)
    assert loaded.model is model and not torch.equal(before, model.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.generate(**tokenizer("1+1=", return_tensors="pt"), max_new_tokens=3, min_new_tokens=3).shape[1] == 7
    with pytest.raises(ConfigError, match="optimizers holds other parameters"):
        GRPOTrainer(folder, count_a, arguments(tmp_path / "o"), data, optimizers=(optimizer, None)).train()


@pytest.mark.slow
def test_16_bit_and_config_made_models(folder: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    data, tokenizer = Dataset.from_list(ROWS), AutoTokenizer.from_pretrained(folder)
    trainer = GRPOTrainer(model, count_a, arguments(tmp_path / "out"), data)
    trainer.train()
    assert trainer.model.dtype == torch.float32
    made = AutoModelForCausalLM.from_config(
        Qwen2Config(**SHAPE | {"vocab_size": len(tokenizer), "num_hidden_layers": 1})
    )
    made.config._name_or_path = ""
    with pytest.raises(ConfigError, match="processing_class is missing"):
        GRPOTrainer(made, count_a, arguments(tmp_path / "made"), data)
    trainer = GRPOTrainer(made, count_a, arguments(tmp_path / "made"), data, processing_class=tokenizer)
    trainer.train()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "made" / "final").config.num_hidden_layers == 1


@pytest.mark.slow
def test_an_adapter(folder: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = trained(folder, tmp_path / "out", peft_config=config, beta=0.1)
    assert trainer.config.lora.target_modules == ["q_proj", "v_proj"] and trainer.config.lora.lora_alpha == 8
    trainer.save_model(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    merged_model = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final", dtype=torch.float32)
    for (name, ours), theirs in zip(merged_model.named_parameters(), final.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name
    with pytest.raises(ConfigError, match="peft_config has use_dora True"):
        GRPOTrainer(folder, count_a, arguments(tmp_path / "o"), ROWS, peft_config=LoraConfig(use_dora=True))


@pytest.mark.slow
def test_resume_goes_on_exactly(folder: str, tmp_path: Path) -> None:
    whole = trained(folder, tmp_path / "whole", max_steps=4, lr_scheduler_type="constant")
    first = trained(folder, tmp_path / "part", max_steps=2, save_steps=2, lr_scheduler_type="constant")
    args = arguments(tmp_path / "part", max_steps=4, save_steps=2, lr_scheduler_type="constant")
    with pytest.raises(ConfigError, match="already holds a run"):
        GRPOTrainer(folder, count_a, args, Dataset.from_list(ROWS)).train()
    resumed = GRPOTrainer(folder, count_a, args, Dataset.from_list(ROWS))
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and resumed.state.global_step == 4
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    untimed = [{key: value for key, value in row.items() if key not in timed} for row in first.state.log_history[:2]]
    again = [{key: value for key, value in row.items() if key not in timed} for row in resumed.state.log_history]
    assert again[:2] == untimed and [row["step"] for row in again] == [1, 2, 3, 4, 4]
    tokens = [row["num_tokens"] for row in resumed.state.log_history[:4]]
    assert tokens == [row["num_tokens"] for row in whole.state.log_history[:4]]
    rollouts = [json.loads(line) for line in (tmp_path / "whole" / "rollouts.jsonl").read_text().splitlines()]
    lengths = [len(AutoTokenizer.from_pretrained(folder)(row["prompt"])["input_ids"]) for row in rollouts]
    done = [row["length"] + length for row, length in zip(rollouts, lengths, strict=True)]
    assert tokens == [sum(done[: 4 * step]) for step in (1, 2, 3, 4)]
    saved = json.loads((tmp_path / "part" / "checkpoints" / "step-4" / "trainer_state.json").read_text())
    assert saved["global_step"] == 4 and len(saved["log_history"]) == 4 and saved["num_input_tokens_seen"] == tokens[-1]
    named = GRPOTrainer(folder, count_a, args, Dataset.from_list(ROWS))
    (tmp_path / "part" / "checkpoints" / "step-2" / "trainer_state.json").write_text("{")
    named.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoints" / "step-2"))
    assert losses(named) == losses(whole)[2:]  # the history of a damaged file is lost, and nothing else
    with pytest.raises(ConfigError, match="there is no checkpoint in"):
        GRPOTrainer(folder, count_a, arguments(tmp_path / "none"), ROWS).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_streams_and_chats_and_a_tokenizer_of_ones_own(folder: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    rows = [{"prompt": [{"role": "user", "content": f"{a}+{a}"}], "question": "other", "answer": a} for a in range(9)]
    seen = []

    def reward(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
        seen.append((prompts[0], completions[0], sorted(columns)))
        return [float(len(completion[0]["content"])) for completion in completions]

    stream = IterableDataset.from_generator(lambda: iter(rows))
    args = arguments(tmp_path / "out", shuffle_dataset=False)
    trainer = GRPOTrainer(folder, reward, args, stream, processing_class=tokenizer)
    trainer.train()
    assert [prompt for prompt, _, _ in seen] == [rows[0]["prompt"], rows[1]["prompt"]]  # in their own order
    assert seen[0][1][0]["role"] == "assistant"
    assert seen[0][2] == ["completion_ids", "log_extra", "log_metric", "question", "trainer_state"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_script_without_a_guard_on_two_ranks_trains_as_on_one(folder: str, tmp_path: Path) -> None:
    script = f"""
        import os
        from datasets import Dataset
        from grpo import GRPOConfig, GRPOTrainer

        def reward(completions, **columns):
            return [float(completion.count("a") + completion.count("b")) for completion in completions]

        world = int(os.environ.get("WORLD_SIZE", 1))
        args = GRPOConfig("out%d" % world, per_device_train_batch_size=8 // world, num_generations=4, max_steps=3,
                          max_completion_length=6, learning_rate=1e-2, bf16=False, logging_steps=1)
        trainer = GRPOTrainer({folder!r}, reward, args, Dataset.from_list({ROWS!r}))
        trainer.train()
        if trainer.is_world_process_zero():
            print("LOSSES", [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    found = []
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu_2proc.yaml")]
    for words in ([], launch):
        done = subprocess.run(
            [sys.executable, *words, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        [line] = [line for line in done.stdout.splitlines() if line.startswith("LOSSES")]
        found.append(json.loads(line.removeprefix("LOSSES ")))
    assert found[0] == pytest.approx(found[1], abs=1e-6) and any(found[0])


CELL = """
from datasets import Dataset
from grpo import GRPOConfig, GRPOTrainer

seen = []

async def reward(completions, **columns):
    seen.append(len(completions))
    return [float(completion.count("a")) for completion in completions]

def train(name):
    args = GRPOConfig(name, per_device_train_batch_size=4, num_generations=4, max_steps=2, max_completion_length=6,
                      bf16=False, logging_steps=1, learning_rate=1e-2)
    trainer = GRPOTrainer({folder!r}, reward, args, Dataset.from_list({rows!r}))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

first, second = train("first"), train("second")
assert first == second and len(first) == 2 and seen == [4, 4, 4, 4]
print("TRAINED", len(seen))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_notebook_cell_trains_twice(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    source = CELL.replace("{folder!r}", repr(folder)).replace("{rows!r}", repr(ROWS))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources=resources).execute()
    printed = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    assert "TRAINED 4" in printed


def test_the_public_names_are_these() -> None:
    assert grpo.GRPOConfig is GRPOConfig and grpo.GRPOTrainer is GRPOTrainer
