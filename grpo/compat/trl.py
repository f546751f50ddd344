"""GRPOTrainer with TRL's constructor and methods: a shell around the config, the run and the loop of this trainer.

    trainer = GRPOTrainer(model="Qwen/Qwen3-0.6B", reward_funcs=[f], args=GRPOConfig("out"), train_dataset=dataset)
    trainer.train()          translate (config) -> build_run -> train_run, the same as launch/train.py

Functions, datasets, callbacks and a loaded model have no name that a config could hold. They are registered under one
while the trainer works (`GRPOTrainer._objects`).
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PredictionOutput, TrainOutput

from grpo.compat.arguments import GRPOConfig
from grpo.compat.callbacks import Events, bridge_to, check_callbacks
from grpo.compat.datasets import Prompts, examples_of, prompts_of
from grpo.compat.environments import ENVIRONMENT, given_turns, with_environments
from grpo.compat.logs import merged
from grpo.compat.models import given_model, launch_environment
from grpo.compat.outputs import Outputs
from grpo.compat.rewards import Rewards, rewards_of
from grpo.compat.translate import lora_values, quantization_values, translate
from grpo.data.registry import DATASETS
from grpo.data.rendering import render_prompts
from grpo.data.rows import with_template_settings
from grpo.data.tokenizer import live_tokenizer
from grpo.errors import ConfigError
from grpo.models.given_adapter import given_adapter
from grpo.models.loading import live_model
from grpo.models.optimizers import OPTIMIZERS
from grpo.models.reference import FrozenReference
from grpo.rewards.registry import REWARDS, reward_labels
from grpo.rollout.evaluation import Evaluation, evaluate
from grpo.run.build import build_rewards, build_run
from grpo.run.callbacks import CALLBACKS
from grpo.run.checkpoint import newest_valid
from grpo.run.checkpointer import find_checkpoint
from grpo.run.state import Run
from grpo.runtime.device import torch_defaults
from grpo.runtime.oom import memory_advice
from grpo.runtime.signals import Signals
from grpo.tracking.console import show_messages
from grpo.trainer import train_run
from grpo.turns.environment import ENVIRONMENTS
from grpo.turns.tools import TOOLS

log = logging.getLogger(__name__)

DATASET, CALLBACK, OPTIMIZER = "train_dataset", "trainer_callbacks", "given_optimizer"
"""Names in the config of what GRPOTrainer was given."""
RESET_TOKENS = 1024
"""Tokens that the text of an environment's `reset` may add to a prompt. They bound memory only."""
CHANGED_ON_RESUME = ["rewards", "model.name"]
"""Keys that may differ on resume: the file of a script with rewards, the folder of a loaded model's config."""


class GRPOTrainer(Outputs):
    """Trains a model with GRPO. Arguments as in TRL 1.16.

    Args:
        model: Id or folder of a causal LM, or a loaded one, which is trained in place; with an adapter
            (peft.PeftModel), that is trained on, and the reference has its weights of now.
        reward_funcs: One or several of: a function, the name of a reward, a model for sequence classification.
        args: The settings; default: `GRPOConfig("<model>-GRPO")`.
        train_dataset: Rows with a column `prompt`, a text or messages. Other columns go to the rewards.
        eval_dataset: Rows to evaluate, or several sets by name.
        processing_class: The tokenizer; default: that of the model.
        reward_processing_classes: Tokenizers of the reward models.
        callbacks: transformers' TrainerCallbacks.
        optimizers: An optimizer over the parameters of a loaded model, and its schedule; None for those of `args`.
        quantization_config: BitsAndBytesConfig(load_in_4bit=True), with peft_config.
        peft_config: A peft.LoraConfig.
        tools: Functions that the model may call, with annotations and docstrings. They need prompts of messages.
        environment_factory: A class of environments whose public methods are tools, or several by the value of the
            column `environment`.

    Raises:
        ConfigError: Something is not supported, with what to use instead. Before any weight loads.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ) -> None:
        if rollout_func is not None:
            raise ConfigError(
                "GRPOTrainer: rollout_func is not supported: for several turns, pass tools or environment_factory; to "
                "sample in another way, write an engine (rollout.engine)"
            )
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
            args = GRPOConfig(f"{Path(name).name}-GRPO")
        if args.eval_strategy != "no" and eval_dataset is None:
            raise ConfigError(f"eval_strategy is {args.eval_strategy}, but eval_dataset is missing: pass one")
        show_messages()
        self.args, self.train_dataset, self.eval_dataset = args, train_dataset, eval_dataset
        self.reward_funcs, self._optimizers = reward_funcs, optimizers
        remarks: list[str] = []
        self._turns = given_turns(tools, environment_factory)
        placeholders = (args.generation_batch_size or 0) // (args.num_generations or 1) if args.max_steps > 0 else 0
        self._prompts = prompts_of(train_dataset, eval_dataset, self._turns, placeholders)
        self._rewards = self._given_rewards(reward_funcs, reward_processing_classes)
        self._given = given_model(model, processing_class, remarks)
        self.processing_class = self._given.tokenizer
        self._environment = self._turns.environment(self.processing_class, args.max_tool_calling_iterations)
        if self._given.adapter is not None:
            if peft_config is not None:
                raise ConfigError("model has an adapter already: leave out peft_config, or pass the base model with it")
            peft_config = self._given.adapter.model.peft_config[self._given.adapter.name]
        values = {} if peft_config is None else lora_values(peft_config, self._given.model_type, remarks)
        values |= {} if quantization_config is None else quantization_values(quantization_config)
        self._translation = translate(args, self._prompts.rows, self._own_values() | values)
        for line in remarks + self._translation.remarks:
            log.warning(line)
        labels = reward_labels(self._rewards.weights)
        weights = {labels[name]: weight for name, weight in self._rewards.weights.items()}
        sets = {name: len(examples) for name, examples in self._prompts.held_out.items()}
        self.events = Events(args, self._translation.schedule, check_callbacks(callbacks), weights, sets)
        self.events.evaluate = self._evaluate_after
        self._run: Run | None = None
        self._is_over = self._is_held = False
        self.state = self.events.state
        self.events.call("on_init_end")

    def _given_rewards(self, funcs: Any, tokenizers: Any) -> Rewards:
        """Return the rewards, with those of environments, which have the weight 1."""
        weights = self.args.reward_weights
        if not self._turns.factories:
            return rewards_of(funcs, weights, tokenizers)
        listed = list(funcs) if isinstance(funcs, list | tuple) else [] if funcs is None else [funcs]
        own = self._turns.rewards()
        if weights is not None and len(weights) == len(listed):
            weights = [*weights, *[1.0] * len(own)]
        if isinstance(tokenizers, list | tuple) and len(tokenizers) == len(listed):
            tokenizers = [*tokenizers, *[None] * len(own)]
        return rewards_of([*map(with_environments, listed), *own], weights, tokenizers)

    def _own_values(self) -> dict[str, Any]:
        """Return the keys that name what this trainer was given."""
        turns = self._turns
        template: Any = self.args.chat_template_kwargs or {}  # a text was read in __post_init__
        shown = {**template, "tools": turns.schemas[None]} if turns.schemas.get(None) else template
        longest = self._prompts.longest_prompt(self.processing_class, shown)
        longest += RESET_TOKENS if turns.factories else 0
        limit = 2 * longest if self._prompts.streamed else None
        completion = self.args.max_completion_length or 0
        values: dict[str, Any] = {
            "run_dir": self._output_dir,
            "model.name": self._given.path,
            "data.name": DATASET,
            "data.streaming": self._prompts.streamed,
            "data.max_prompt_length": limit,
            "data.eval_size": None,
            "data.system_prompt": None,
            "rewards": self._rewards.weights,
            "scoring.workers": 0 if self._rewards.live else 2,
            "callbacks": [CALLBACK],
            # The rows of a backward pass in TRL, at their longest. It bounds memory only.
            "tokens_per_batch": self.args.per_device_train_batch_size * ((limit or longest) + completion),
        }
        if self._optimizers[0] is not None:
            values["optimizer.optim"] = OPTIMIZER
        return values | turns.values(template)

    @contextlib.contextmanager
    def _objects(self) -> Iterator[None]:
        """Register within what has no name of its own, and compute with torch's defaults. Reentrant."""
        if self._is_held:
            yield
            return
        given = self._given
        with contextlib.ExitStack() as stack:
            self._is_held = True
            stack.callback(setattr, self, "_is_held", False)
            stack.enter_context(torch_defaults())
            stack.enter_context(DATASETS.holding(DATASET, self._prompts.function()))
            stack.enter_context(CALLBACKS.holding(CALLBACK, bridge_to(self.events)))
            stack.enter_context(OPTIMIZERS.holding(OPTIMIZER, self._given_optimizer))
            stack.enter_context(live_tokenizer(given.path, given.tokenizer))
            for name, function in self._rewards.live.items():
                stack.enter_context(REWARDS.holding(name, function))
            for name, tool in self._turns.live_tools().items():
                stack.enter_context(TOOLS.holding(name, tool))
            if self._turns.factories:
                stack.enter_context(ENVIRONMENTS.holding(ENVIRONMENT, self._environment))
            if given.live is not None:
                stack.enter_context(live_model(given.path, given.live))
            if given.adapter is not None:
                stack.enter_context(given_adapter(given.path, given.adapter))
            yield

    def _given_optimizer(self, parameters: Any, config: Any, *, fused: bool | None) -> torch.optim.Optimizer:
        """Return the optimizer of `optimizers`, which must hold the parameters that are trained."""
        optimizer = self._optimizers[0]
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if held != {id(parameter) for parameter in parameters}:
            raise ConfigError(
                "optimizers holds other parameters than those that are trained: pass a loaded model in float32, and an "
                "optimizer over model.parameters()"
            )
        return optimizer

    # The run

    def _build(self, resume: Path | None = None) -> Run:
        """Return the run, built on the first use; again where it resumes from a checkpoint."""
        if self._run is not None and (resume is None or self._is_over):
            return self._run
        if self._run is not None:
            self._run.close()
            if self._given.live is not None and self._run.policy.adapter is not None:
                self._run.policy.adapter.unload()  # a new one is made
        config = self._translation.config
        config.resume = None if resume is None else str(resume)
        config.allow_changes = CHANGED_ON_RESUME if resume else []
        with self._objects(), memory_advice(config), launch_environment(self._translation.precision, self.args.use_cpu):
            self._run = build_run(config)
        if self._optimizers[1] is not None:
            if resume is not None:
                raise ConfigError("optimizers has a schedule, which cannot be resumed: leave it to lr_scheduler_type")
            self._run.policy.scheduler = self._optimizers[1]
        return self._run

    def train(self, resume_from_checkpoint: bool | str | None = None, **unused: Any) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: True: the newest checkpoint in output_dir; or the folder of one. state.log_history
                goes on where it ends there.

        Raises:
            ConfigError: There is no checkpoint to resume from, or output_dir holds a run already.
        """
        if self._is_over:
            raise ConfigError("train() was called before: make a new GRPOTrainer, with another output_dir")
        checkpoint = self._checkpoint(resume_from_checkpoint)
        run = self._build(checkpoint)
        if checkpoint is not None:
            self.events.restore(checkpoint)
        begun, self._is_over = time.perf_counter(), True
        with self._objects(), Signals() as signals, memory_advice(run.config):
            self.events.begin(run.start)
            train_run(run, signals)
        if self.events.error is not None:
            raise self.events.error
        seconds, updates = time.perf_counter() - begun, self.events.state.global_step
        completions = run.config.prompts_per_step * run.config.sampling.num_generations
        losses = self.events.losses
        metrics = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(len(losses) * completions / seconds, 3),
            "train_steps_per_second": round(len(losses) * self._translation.schedule.updates / seconds, 3),
            "total_flos": 0.0,
            "train_loss": sum(losses) / max(1, len(losses)),
        }
        left = merged(self.events.entries)  # of the steps since the last entry, as in TRL
        self.events.log({key: value for key, value in left.items() if key != "loss"} | metrics)
        self.events.call("on_train_end")
        if self.args.push_to_hub:
            self.push_to_hub()
        return TrainOutput(updates, metrics["train_loss"], metrics)

    def _checkpoint(self, asked: bool | str | Path | None) -> Path | None:
        """Return the folder of the checkpoint that resume_from_checkpoint names."""
        if not asked:
            return None
        config = self._translation.config
        folder = Path(config.run_dir or "")
        if asked is True and newest_valid(folder) == (None, []):
            raise ConfigError(f"resume_from_checkpoint: there is no checkpoint in {folder}")
        return find_checkpoint(dataclasses.replace(config, resume="auto" if asked is True else str(asked)), folder)

    def end(self) -> None:
        """Finish the trackers, and the group of processes. Call it last in a script."""
        if self._run is not None:
            self._run.close()
            self._run.accelerator.end_training()

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Answer the evaluation prompts and score them. Collective.

        Args:
            eval_dataset: Rows, or several sets by name; default: those of the constructor.

        Returns:
            eval_reward, eval_rewards/<name>/mean, eval_completions/mean_length, ...; of several sets, all together and
            eval_<set>_... of each.
        """
        prompts = self._prompts if eval_dataset is None else prompts_of([], eval_dataset, self._turns)
        if not prompts.held_out:
            raise ConfigError("evaluate: there is no eval_dataset: pass one")
        found = self._evaluate(prompts)
        sets = {name: len(examples) for name, examples in prompts.held_out.items()}
        logs = self.events.evaluated(found.rows, metric_key_prefix, sets)
        self.log(logs)
        self.events.call("on_evaluate", metrics=logs)
        return logs | {"epoch": self.state.epoch}

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Return the completions of `test_dataset`, in its order, and their metrics."""
        examples = list(examples_of(test_dataset, "test_dataset", self._turns))
        found = self._evaluate(Prompts([], {"": examples}, False))
        metrics = self.events.evaluated(found.rows, metric_key_prefix, {})
        return PredictionOutput([row["completion"] for row in found.rows], None, metrics)  # type: ignore[arg-type]

    def _evaluate_after(self, step: int) -> dict[str, float]:
        """Evaluate after a step of the run, where a callback asks for it: with the run's own prompts if it has some."""
        run = self._build()
        if not run.held_out:
            return self.evaluate()
        metrics = run.evaluate(step)
        return metrics | self.events.log_evaluation(run.recorder.evaluated) if metrics else {}

    def _evaluate(self, prompts: Prompts) -> Evaluation:
        run = self._build()
        examples = [example for one in prompts.held_out.values() for example in one]
        examples = [with_template_settings(example, run.config.data) for example in examples]
        rendered, _ = render_prompts(examples, self.processing_class, None)
        with self._objects(), contextlib.closing(build_rewards(run.config)) as rewards:
            rewards.start()
            return evaluate(
                run.engine,
                rendered,
                run.accelerator,
                max_completion_length=run.config.sampling.max_completion_length,
                samples=run.config.evaluation.num_generations,
                temperature=run.config.evaluation.temperature,
                rewards=rewards,
            )

    # Attributes of transformers' Trainer

    @property
    def model(self) -> Any:
        """The trained model, a peft.PeftModel with peft_config. Loads it on the first use."""
        policy = self._build().policy
        return policy.model if policy.adapter is None else policy.adapter

    @property
    def ref_model(self) -> Any:
        """The frozen reference; None with beta 0, or where it is the model without its adapter."""
        reference = self._build().policy.reference
        return reference.model if isinstance(reference, FrozenReference) else None

    @property
    def accelerator(self) -> Any:
        """The Accelerator. Loads the model on the first use."""
        return self._build().accelerator

    @property
    def optimizer(self) -> Any:
        """The optimizer. Loads the model on the first use."""
        return self._build().policy.optimizer

    @property
    def lr_scheduler(self) -> Any:
        """The learning rate schedule. Loads the model on the first use."""
        return self._build().policy.scheduler

    @property
    def tokenizer(self) -> Any:
        """processing_class."""
        return self.processing_class

    @property
    def config(self) -> Any:
        """The config of this trainer that `args` stand for."""
        return self._translation.config

    @property
    def control(self) -> Any:
        """transformers' TrainerControl."""
        return self.events.control

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add an entry to state.log_history and call on_log."""
        self.events.log(logs)

    def add_callback(self, callback: Any) -> None:
        """Add a TrainerCallback, or a class of them."""
        [found] = check_callbacks([callback])
        self.events.callbacks.append(found() if isinstance(found, type) else found)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a TrainerCallback, or the first one of a class, and return it; None where there is none."""
        for found in self.events.callbacks:
            if found is callback or (isinstance(callback, type) and isinstance(found, callback)):
                self.events.callbacks.remove(found)
                return found
        return None

    def remove_callback(self, callback: Any) -> None:
        """Remove a TrainerCallback, or the first one of a class."""
        self.pop_callback(callback)
