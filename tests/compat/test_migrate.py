"""grpo migrate: typical scripts for TRL, read without being run."""

import ast
from pathlib import Path

import pytest
import yaml

from grpo import cli
from grpo.compat.migrate import migrate
from grpo.config.parser import load_config
from grpo.errors import ConfigError

PLAIN = '''
import re
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

raise RuntimeError("a script is never run")

PATTERN = re.compile(r"####")

def helper(text):
    return PATTERN.search(text) is not None

def has_answer(completions, **kwargs):
    """1 for an answer."""
    return [float(helper(c)) for c in completions]

async def short(completions, **kwargs):
    return [-len(c) / 100 for c in completions]

dataset = load_dataset("openai/gsm8k", "main", split="train")
training_args = GRPOConfig(
    output_dir="out", learning_rate=2e-6, beta=0.04, num_generations=4, per_device_train_batch_size=4,
    gradient_accumulation_steps=2, max_steps=100, num_iterations=2, save_steps=50, bf16=True, report_to="wandb",
    reward_weights=[1.0, 0.5], logging_steps=1, top_p=0.9, dataloader_num_workers=4,
)
training_args.epsilon_high = 0.28
trainer = GRPOTrainer(
    model="Qwen/Qwen3-0.6B", reward_funcs=[has_answer, short], args=training_args, train_dataset=dataset,
)
trainer.train()
'''


def test_a_plain_script() -> None:
    made = migrate(PLAIN)
    assert made.config["model.name"] == "Qwen/Qwen3-0.6B" and made.config["run_dir"] == "out"
    assert made.config["prompts_per_step"] == 2 and made.config["steps"] == 50 and made.config["save_every"] == 25
    assert made.config["objective.epsilon_high"] == 0.28 and made.config["objective.num_iterations"] == 2
    assert "objective.beta" not in made.config  # 0.04 is the default here
    assert made.config["rewards"] == {"migrated/rewards.py:has_answer": 1.0, "migrated/rewards.py:short": 0.5}
    assert (made.config["data.path"], made.config["data.subset"]) == ("openai/gsm8k", "main")
    assert made.config["tracking.report_to"] == ["wandb"]
    [line] = [line for line in made.by_hand if line.startswith("top_p")]
    assert "would bias the importance ratios" in line
    assert "learning_rate = 2e-06 -> mapped: optimizer.learning_rate" in made.lines
    assert any(line.startswith("dataloader_num_workers = 4 -> no effect") for line in made.lines)
    assert made.lines[-1] == "precision -> accelerate launch --mixed_precision bf16"


def test_the_rewards_file_has_what_the_functions_use_and_nothing_else() -> None:
    tree = ast.parse(migrate(PLAIN).rewards)
    assert [type(node).__name__ for node in tree.body[1:]] == [
        *("Import", "Assign", "FunctionDef", "FunctionDef", "AsyncFunctionDef")
    ]
    space: dict = {}
    exec(migrate(PLAIN).rewards, space)  # noqa: S102
    assert space["has_answer"](["#### 4", "4"]) == [1.0, 0.0]


VARIABLES = """
import argparse
import trl
from peft import LoraConfig
from my_rewards import accuracy as scored
MODEL = "Qwen/Qwen3-0.6B"
LENGTH = 256
common = dict(output_dir="out", max_completion_length=LENGTH, num_train_epochs=1)
options = {"beta": 0.1, "learning_rate": argparse.Namespace(lr=1e-5).lr}
def main():
    args = trl.GRPOConfig(**common, **options, model_init_kwargs={"dtype": torch.bfloat16})
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    rewards = [scored, lambda completions, **kw: [0.0] * len(completions)]
    trainer = trl.GRPOTrainer(model=model, args=args, reward_funcs=rewards, train_dataset=make(), callbacks=[C()],
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj"], use_dora=True))
    trainer.train()
if __name__ == "__main__":
    main()
"""


def test_dicts_variables_adapters_and_what_cannot_be_read() -> None:
    made = migrate(VARIABLES)
    assert made.config["model.name"] == "Qwen/Qwen3-0.6B"
    assert made.config["sampling.max_completion_length"] == 256 and made.config["objective.beta"] == 0.1
    assert made.config["num_train_epochs"] == 1.0 and "steps" not in made.config
    assert (made.config["lora.r"], made.config["lora.target_modules"]) == (16, ["q_proj"])
    assert made.config["rewards"] == {"my_rewards:scored": 1.0} and made.rewards == ""
    text = "\n".join(made.by_hand)
    assert "Namespace(lr=1e-05).lr (line 9) cannot be read: set optimizer.learning_rate" in text
    assert "reward lambda completions, **kw: [0.0] * len(completions) is no function at the top" in text
    assert "GRPOTrainer(callbacks=...) has no key" in text and "train_dataset cannot be read" in text
    assert "LoraConfig use_dora = True" in text and "weights are trained in float32" in text


PARSED = """
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser
def main(script_args, training_args, model_args):
    dataset = load_dataset(script_args.dataset_name)
    trainer = GRPOTrainer(model=model_args.model_name_or_path, reward_funcs=get(), args=training_args,
                          train_dataset=dataset["train"], peft_config=get_peft_config(model_args))
    trainer.train()
if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
    main(*parser.parse_args_and_config())
"""


def test_a_script_whose_config_is_on_the_command_line() -> None:
    made = migrate(PARSED)
    text = "\n".join(made.by_hand)
    assert "TrlParser reads the config from the command line" in text
    assert "model = model_args.model_name_or_path cannot be read: set model.name" in text
    assert "peft_config = get_peft_config(model_args) cannot be read: set lora.*" in text
    assert "reward get() is no function" in text


MAPPED = """
from trl import GRPOConfig, GRPOTrainer
from datasets import load_dataset
def reward(completions, **kwargs): return [1.0] * len(completions)
ds = load_dataset("json", data_files="rows.jsonl", split="train").map(lambda row: {"prompt": row["q"]})
GRPOTrainer("gpt2", reward, args=GRPOConfig("out", num_generations=3), train_dataset=ds).train()
"""


def test_rows_that_the_script_changes_and_sizes_that_do_not_divide() -> None:
    made = migrate(MAPPED)
    assert made.config["data.path"] == "rows.jsonl" and made.config["model.name"] == "gpt2"
    text = "\n".join(made.by_hand)
    assert "the script changes its rows" in text
    assert "generation_batch_size is 8" in text and "needs to be a multiple of num_generations 3" in text


@pytest.mark.parametrize(
    "source, message",
    [("x = (", "line 1: this is not valid Python"), ("print(1)", "it makes no GRPOTrainer")],
)
def test_what_is_no_script_for_trl(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        migrate(source)


def test_the_command_writes_a_config_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script.py").write_text(PLAIN)
    cli.main(["migrate", str(tmp_path / "script.py"), "--output", str(tmp_path / "new")])
    config = load_config(["--config", str(tmp_path / "new" / "config.yaml")])
    assert config.model.name == "Qwen/Qwen3-0.6B" and config.steps == 50
    assert list(config.rewards) == [f"{tmp_path / 'new' / 'rewards.py'}:{name}" for name in ("has_answer", "short")]
    assert yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())["sampling"] == {"num_generations": 4}
    shown = capsys.readouterr().out
    assert "To do by hand:\n- top_p = 0.9 is not supported" in shown and "Written: " in shown


TOOLS = """
from trl import GRPOConfig, GRPOTrainer
from tools_of_mine import search

UNITS = {"km": 1000}

def to_metres(value: float, unit: str) -> float:
    return value * UNITS[unit]

def reward(completions, **kwargs):
    return [0.0 for _ in completions]

trainer = GRPOTrainer(
    "m", reward, GRPOConfig("out", max_steps=2, max_tool_calling_iterations=3), tools=[to_metres, search, print("x")]
)
"""


def test_tools_become_a_file_and_addresses() -> None:
    made = migrate(TOOLS)
    assert made.config["tools"] == ["migrated/tools.py:to_metres", "tools_of_mine:search"]
    assert made.config["turns.max_tool_calling_iterations"] == 3
    assert "UNITS = " in made.tools and "def to_metres" in made.tools and "def reward" not in made.tools
    assert any(line.startswith("tool print('x') is no function") for line in made.by_hand)
