"""Rollouts: prompts -> groups of completions. One protocol, several engines that agree with each other."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.errors import ConfigError
from grpo.registry import Registry
from grpo.types import Group, Prompt, SamplingPlan


class RolloutEngine(Protocol):
    """What the trainer needs of an engine."""

    def generate(
        self, prompts: list[Prompt], plan: SamplingPlan, finished: Callable[[Group], None] | None = None
    ) -> list[Group]:
        """plan.num_generations completions for each prompt, in the order of the prompts. `finished` gets each group as soon
        as its last completion is done, in any order, so that it can be scored while others are still being sampled."""
        ...

    def update_weights(self, step: int) -> None:
        """The model that the engine was built with has changed: it now holds the weights after `step`."""
        ...


EngineFactory = Callable[..., RolloutEngine]
"""(model, tokenizer, *, ...) with any of: slots, uses_packed_attention, cache_gib, config (RolloutConfig), accelerator, weights, longest."""

ENGINES: Registry[EngineFactory] = Registry("engine", package="grpo.rollout")
register_engine = ENGINES.register


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the generation config's (a list for Llama-3), else the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    found = {token for token in [*ids, tokenizer.eos_token_id] if token is not None}
    if not found:
        raise ConfigError(
            "neither the model's generation config nor its tokenizer names an end token, so no completion could ever end: set "
            "eos_token in tokenizer_config.json, or take a model that has one"
        )
    return sorted(found)


def build_engine(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **offered: Any
) -> RolloutEngine:
    """The engine called `name`, with those of the `offered` values that it names. slots: completions at a time; uses_packed_attention: the
    model runs with our attention (grpo/kernels/attention.py); for engines with weights of their own see grpo/rollout/vllm_engine.py.
    """
    factory = find_engine(name)
    named = inspect.signature(factory).parameters
    return factory(model, tokenizer, **{key: value for key, value in offered.items() if key in named})


def find_engine(name: str) -> EngineFactory:
    """Raises ConfigError if there is none."""
    return ENGINES.get(name)


def is_separate(engine: RolloutEngine) -> bool:
    """Whether the engine has weights of its own, which may then differ from the trainer's."""
    return getattr(engine, "separate", False)


def device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
