"""Scripts like those that TRL publishes for GRPO (single turn, text), on a tiny model, with the import changed.

Each script does what the published one of its name does, with the same calls and arguments of the trainer, on local
data. docs/trl.md lists them. The command line script of TRL itself is run as it is, where TRL is installed.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoTokenizer

from grpo import GRPOConfig, GRPOTrainer
from grpo.compat.expectations import EXAMPLES
from tests.fakes import tiny_folder

pytestmark = pytest.mark.slow

SMALL = """
    per_device_train_batch_size=4, num_generations=4, max_completion_length=8, max_steps=2, logging_steps=1, bf16=False
"""
SCRIPTS = {
    # The quick start of the documentation: a model, a reward and a dataset, and nothing else.
    "quick_start": """
from datasets import load_dataset
from trl import GRPOTrainer

def right_answer(completions, solution, **kwargs):
    return [float(one[0]["content"].strip() == answer) for one, answer in zip(completions, solution, strict=True)]

trainer = GRPOTrainer(
    model="model", reward_funcs=right_answer, train_dataset=load_dataset("json", data_files="two.jsonl", split="train")
)
trainer.train()
""",
    # Its reward functions: token ids, a pattern, a reference column, a coroutine, and two tasks with a reward each.
    "rewards": f"""
import asyncio
import re

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

def tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def pattern(completions, **kwargs):
    return [float(bool(re.match(r"^[a-z ]*$", text))) for text in completions]

def reference(completions, ground_truth, **kwargs):
    return [float(truth in text) for text, truth in zip(completions, ground_truth, strict=True)]

async def remote(prompts, completions, **kwargs):
    await asyncio.sleep(0.001)
    return [float(len(prompt) > len(text)) for prompt, text in zip(prompts, completions, strict=True)]

def of_task(name, completions, task):
    return [float(len(set(text))) if mine == name else None for text, mine in zip(completions, task, strict=True)]

def math_reward(prompts, completions, task, **kwargs):
    return of_task("math", completions, task)

def code_reward(prompts, completions, task, **kwargs):
    return of_task("code", completions, task)

rows = [{{"prompt": f"{{a}}+{{a}}=", "ground_truth": str(2 * a), "task": ("math", "code")[a % 2]}} for a in range(8)]
trainer = GRPOTrainer(
    model="model",
    reward_funcs=[tokens, pattern, reference, remote, math_reward, code_reward],
    args=GRPOConfig("out", reward_weights=[0.1, 1.0, 1.0, 0.5, 1.0, 1.0], shuffle_dataset=False, {SMALL}),
    train_dataset=Dataset.from_list(rows),
)
trainer.train()
names = [name for name in trainer.state.log_history[0] if name.endswith("_reward/mean")]
assert names == ["rewards/math_reward/mean"], names  # the first prompt is of this task
assert "rewards/code_reward/mean" in trainer.state.log_history[1]
""",
    # grpo_tldr.py: an adapter on all layers, a KL term, weights asked for in 16 bits.
    "tldr": f"""
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

dataset = load_dataset("json", data_files="sums.jsonl", split="train").select(range(8))

def unique_characters(completions, **kwargs):
    return [len(set(completion)) for completion in completions]

trainer = GRPOTrainer(
    model="model",
    args=GRPOConfig(
        "test", log_level="debug", gradient_checkpointing=True, beta=0.1,
        model_init_kwargs={{"torch_dtype": "bfloat16"}},
        {SMALL.replace("bf16=False", "bf16=True")}
    ),
    reward_funcs=unique_characters,
    train_dataset=dataset,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
""",
}
PARSED = {
    # gspo.py: GSPO with a system prompt, a format reward of TRL and evaluation, from the command line.
    "gspo": (
        """
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser
from trl import get_peft_config, get_quantization_config
from trl.rewards import think_format_reward

script_args, training_args, model_args = TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config()
training_args.model_init_kwargs = dict(
    revision=model_args.model_revision,
    attn_implementation=model_args.attn_implementation,
    dtype=model_args.dtype,
    quantization_config=get_quantization_config(model_args),
)
train, test = load_dataset("json", data_files="sums.jsonl", split=["train[:60%]", "train[60%:]"])

def conversation(row):
    system = "first think between <think> and </think>, then answer"
    return {"prompt": [{"role": "system", "content": system}, {"role": "user", "content": row["question"]}]}

def same(completions, solution, **kwargs):
    texts = [completion[0]["content"].strip().lower() for completion in completions]
    return [float(text == right.strip().lower()) for text, right in zip(texts, solution, strict=True)]

trainer = GRPOTrainer(
    model=model_args.model_name_or_path,
    args=training_args,
    reward_funcs=[think_format_reward, same],
    train_dataset=train.map(conversation).remove_columns(["question"]),
    eval_dataset=test.map(conversation).remove_columns(["question"]),
    peft_config=get_peft_config(model_args),
)
trainer.train()
trainer.save_model(training_args.output_dir)
if training_args.push_to_hub:
    trainer.push_to_hub(dataset_name=script_args.dataset_name)
""",
        "--use_peft --lora_target_modules q_proj v_proj --log_completions --importance_sampling_level sequence "
        "--epsilon 3e-4 --epsilon_high 4e-4 --beta 0.0 --loss_type grpo --gradient_accumulation_steps 2 "
        "--steps_per_generation 4 --learning_rate 1e-3 --eval_strategy steps --eval_steps 2",
    ),
    # grpo_continuous_batching.py: GSM8K's answers after ####, with settings of transformers' engine.
    "continuous_batching": (
        """
import re

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

script_args, training_args, model_args = TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config()
training_args.model_init_kwargs = dict(
    revision=model_args.model_revision, attn_implementation=model_args.attn_implementation, dtype=model_args.dtype
)
dataset = load_dataset("json", data_files="sums.jsonl", split=script_args.dataset_train_split)

def conversation(row):
    return {"prompt": [{"role": "user", "content": row["question"]}], "reference_answer": row["solution"]}

def correct(completions, reference_answer, **kwargs):
    found = [re.search(r"####\\\\s*([0-9]+)", completion[-1]["content"]) for completion in completions]
    return [float(bool(one) and one[1] == right) for one, right in zip(found, reference_answer, strict=True)]

training_args.use_transformers_continuous_batching = True
training_args.transformers_continuous_batching_config = {"use_cuda_graph": False}
trainer = GRPOTrainer(
    model=model_args.model_name_or_path,
    reward_funcs=correct,
    args=training_args,
    train_dataset=dataset.map(conversation, remove_columns=dataset.column_names),
    peft_config=get_peft_config(model_args),
)
trainer.train()
trainer.save_model(training_args.output_dir)
""",
        "--use_peft --log_completions",
    ),
}
FLAGS = (
    "--model_name_or_path model --output_dir out --per_device_train_batch_size 4 --num_generations 4 --max_steps 2 "
    "--max_completion_length 8 --logging_steps 1 --bf16 false"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tiny model and data."""
    tiny_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a}+{a}=", "question": f"{a}+{a}=", "solution": str(2 * a)} for a in range(10)]
    chats = [{"prompt": [{"role": "user", "content": row["question"]}], "solution": row["solution"]} for row in rows]
    for name, data in {"sums.jsonl": rows, "two.jsonl": chats[:2]}.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in data))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def run_script(source: str) -> GRPOTrainer:
    """Run a script with its import changed, and return its trainer."""
    changed = source.replace("from trl import GRPOTrainer", "from grpo import GRPOTrainer")
    changed = changed.replace("from trl import GRPOConfig, GRPOTrainer", "from grpo import GRPOConfig, GRPOTrainer")
    if "ModelConfig" in source:  # TRL's helpers stay TRL's
        changed = changed.replace("GRPOTrainer, ModelConfig", "GRPOTrainer\nfrom trl import ModelConfig")
    assert changed != source
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(changed, "script.py", "exec"), names)
    trainer = names["trainer"]
    assert type(trainer) is GRPOTrainer and trainer.state.log_history[-1]["train_loss"] is not None
    return trainer


def test_every_script_is_listed() -> None:
    assert [name for name, _, _ in EXAMPLES if name] == [*SCRIPTS, *PARSED, "command_line"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_with_its_import_changed(place: Path, name: str) -> None:
    trainer = run_script(SCRIPTS[name])
    assert trainer.state.global_step == trainer.state.max_steps == (6 if name == "quick_start" else 2)
    if name == "tldr":
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        assert trainer.config.objective.beta == 0.1 and trainer.config.lora.target_modules == ["all-linear"]
    assert (place / {"quick_start": "model-GRPO", "tldr": "test"}.get(name, "out") / "final").is_dir()


@pytest.mark.parametrize("name", PARSED)
def test_a_script_with_trls_parser_runs_with_its_import_changed(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason='pip install -e ".[benchmark]"')
    source, flags = PARSED[name]
    monkeypatch.setattr(sys, "argv", ["script.py", *FLAGS.split(), *flags.split()])
    trainer = run_script(source)
    assert trainer.state.global_step == 2 and (place / "out" / "adapter_model.safetensors").is_file()
    if name == "gspo":
        assert trainer.config.objective.mini_batches == 2 and trainer.config.objective.epsilon_high == 4e-4
        logged = [entry for entry in trainer.state.log_history if "eval_rewards/same/mean" in entry]
        assert [entry["step"] for entry in logged] == [0, 2]


def test_trls_command_line_script_runs_as_it_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """trl/scripts/grpo.py, which `trl grpo` runs. It imports the two classes from trl when it runs."""
    trl = pytest.importorskip("trl", reason='pip install -e ".[benchmark]"')
    script = pytest.importorskip("trl.scripts.grpo")
    (place / "data").mkdir()
    (place / "sums.jsonl").rename(place / "data" / "train.jsonl")
    (place / "own_rewards.py").write_text(
        "def short(completions, **kwargs):\n    return [-len(c) for c in completions]\n"
    )
    flags = "--dataset_name data --reward_funcs own_rewards.short get_soft_overlong_punishment --use_peft --lora_r 4"
    made = []

    class Kept(GRPOTrainer):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            made.append(self)

    monkeypatch.setattr(sys, "path", [*sys.path])
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(trl, "GRPOTrainer", Kept))
        stack.enter_context(mock.patch.object(trl, "GRPOConfig", GRPOConfig))
        parser = script.make_parser()
        script.main(*parser.parse_args_and_config([*FLAGS.split(), *flags.split()], fail_with_unknown_args=False))
    [trainer] = made
    assert trainer.state.global_step == 2 and "rewards/short/mean" in trainer.state.log_history[0]
    assert (place / "out" / "adapter_model.safetensors").is_file()
