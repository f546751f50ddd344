"""Error messages of GRPOTrainer and GRPOConfig, word for word, for tests/docs/test_errors.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from transformers import AutoTokenizer

from grpo.compat.arguments import GRPOConfig
from grpo.compat.datasets import examples_of
from grpo.compat.rewards import rewards_of
from grpo.compat.translate import lora_values, translate
from grpo.compat.trl import GRPOTrainer
from tests.compat.rewards import count_a
from tests.fakes import save_tokenizer, tiny_folder, tiny_model

GIVEN = {"model.name": "m", "rewards": {"accuracy": 1.0}, "tokens_per_batch": 8192}
ROWS = [{"prompt": "1+1="}]


def fields(**given: Any) -> Callable[[Path], Any]:
    return lambda _: translate(GRPOConfig("out", **given), 8, GIVEN)


def trainer(**given: Any) -> Callable[[Path], Any]:
    arguments = {"model": "m", "reward_funcs": count_a, "args": GRPOConfig("out"), "train_dataset": ROWS}
    return lambda _: GRPOTrainer(**(arguments | given))


def adapted(names: list[str], **given: Any) -> Callable[[Path], Any]:
    def provoke(folder: Path) -> Any:
        size = save_tokenizer(folder)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
        model = peft.get_peft_model(tiny_model(vocab_size=size), settings, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, settings)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return GRPOTrainer(model, count_a, GRPOConfig("out"), ROWS, processing_class=tokenizer, **given)

    return provoke


def trained(again: bool) -> Callable[[Path], Any]:
    def provoke(folder: Path) -> Any:
        made = GRPOTrainer(str(tiny_folder(folder / "model")), count_a, GRPOConfig(str(folder / "run")), ROWS * 8)
        made._is_over = again  # as after train()
        return made.train(resume_from_checkpoint=not again)

    return provoke


PROVOKED: dict[str, Callable[[Path], Any]] = {
    "field of TRL that is not supported": fields(top_p=0.9),
    "sizes that do not divide": fields(per_device_train_batch_size=3),
    "optimizer steps that mix two policies": fields(gradient_accumulation_steps=2, steps_per_generation=3),
    "stream without a length": lambda _: translate(GRPOConfig("out"), None, GIVEN),
    "tracker that is not supported": fields(report_to="mlflow"),
    "best model by a loss": fields(load_best_model_at_end=True),
    "option of from_pretrained that is not supported": fields(model_init_kwargs={"revision": "v1"}),
    "rollout_func": trainer(rollout_func=count_a),
    "evaluation without a dataset": trainer(args=GRPOConfig("out", eval_strategy="steps")),
    "dataset without prompts": lambda _: list(examples_of([{"text": "a"}], "train_dataset")),
    "images in the data": lambda _: list(examples_of([{"prompt": "a", "image": "b"}], "train_dataset")),
    "no reward function": lambda _: rewards_of(None, None, None),
    "weights that do not fit the rewards": lambda _: rewards_of([count_a, count_a], [1.0], None),
    "something that is no reward": lambda _: rewards_of([7], None, None),
    "adapter of another kind": lambda _: lora_values(peft.LoraConfig(use_dora=True), "qwen2", []),
    "adapter twice": adapted(["default"], peft_config=peft.LoraConfig()),
    "several adapters": adapted(["first", "second"]),
    "nothing to resume": trained(again=False),
    "train called twice": trained(again=True),
}


MESSAGES: dict[str, str] = {
    "field of TRL that is not supported": "GRPOConfig: top_p is 0.9, which is not supported: a truncated or changed sampling distribution would bias the importance ratios: leave it out (docs/trl.md)",
    "sizes that do not divide": "generation_batch_size is 3 (per_device_train_batch_size 3 x 1 processes x steps_per_generation 1), needs to be a multiple of num_generations 8, so that each prompt has all its completions",
    "optimizer steps that mix two policies": "steps_per_generation is 3 and gradient_accumulation_steps 2: an optimizer step would mix completions of two policies. Make steps_per_generation a multiple of gradient_accumulation_steps",
    "stream without a length": "max_steps is not set, but the length of train_dataset, a stream, is not known: set max_steps",
    "tracker that is not supported": "report_to has 'mlflow', needs to be of tensorboard, trackio, wandb, all or none: pass the callback of another tracker in callbacks=",
    "best model by a loss": "metric_for_best_model is None, needs to be one of eval_rewards/accuracy/mean: an evaluation computes no loss",
    "option of from_pretrained that is not supported": "model_init_kwargs has revision 'v1', which is not supported: load the model yourself and pass it",
    "rollout_func": "GRPOTrainer: rollout_func is not supported: for several turns, pass tools or environment_factory; to sample in another way, write an engine (rollout.engine)",
    "evaluation without a dataset": "eval_strategy is steps, but eval_dataset is missing: pass one",
    "dataset without prompts": "train_dataset, row 1: there is no column 'prompt' (columns there: text): add one with a text or a list of messages",
    "images in the data": "train_dataset, row 1 has the column 'image': prompts must be text",
    "no reward function": "reward_funcs is empty: pass at least one reward function",
    "weights that do not fit the rewards": "reward_weights has 1 entries, needs one for each of the 2 reward_funcs",
    "something that is no reward": "reward_funcs has 7 (int), needs to be a function, the name of a reward, or a model for sequence classification",
    "adapter of another kind": "peft_config has use_dora True, which is not supported: adapters have r, lora_alpha, target_modules and use_rslora",
    "adapter twice": "model has an adapter already: leave out peft_config, or pass the base model with it",
    "several adapters": "model has the adapters ['first', 'second'], needs to be a base model or a peft.PeftModel with one adapter: merge the others (merge_and_unload)",
    "nothing to resume": "resume_from_checkpoint: there is no checkpoint in DIR/run",
    "train called twice": "train() was called before: make a new GRPOTrainer, with another output_dir",
}
