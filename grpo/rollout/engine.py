"""Rollout engines: prompts -> groups of completions. Base class, registry and checks.

A custom engine is a class that inherits from RolloutEngine. It is registered with @register_engine or named by its
path. Its constructor takes the model, the tokenizer, and any of ARGUMENTS by name. Further arguments get their values
from rollout.engine_kwargs.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, Literal

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.schema import Config, RolloutConfig
from grpo.data.gguf import plain_model
from grpo.errors import ConfigError
from grpo.registry import Registry, call_with_supported_args, check_arguments
from grpo.types import Group, Prompt, SamplingPlan

ARGUMENTS = (
    "slots",
    "uses_packed_attention",
    "cache_gib",
    "config",
    "accelerator",
    "weights",
    "longest",
    "step_completions",
)
"""slots: number of completions at a time. uses_packed_attention: the model uses the attention of
grpo/kernels/attention.py. cache_gib: memory for keys and values in GiB. config: the RolloutConfig. accelerator:
the Accelerator. weights: a function that iterates over the full weights by name (collective if they are
sharded). longest: tokens of the longest prompt and completion together, or None. step_completions: number of
completions that a rank samples per training step; evaluations may ask for more at once."""


class RolloutEngine(ABC):
    """Base class of rollout engines. The class attributes declare capabilities before an engine is built."""

    has_own_weights: ClassVar[bool] = False
    """The engine samples from its own copy of the weights. The trainer sends them after each step and checks that
    they arrived."""
    supports_staleness: ClassVar[bool] = True
    """The engine can sample for later steps in a thread (rollout.max_staleness)."""
    needs_packed_attention: ClassVar[bool] = False
    """The engine runs models only with model.attn_implementation grpo."""
    bounds_cache: ClassVar[bool] = False
    """rollout.cache_gib limits the memory of the engine's keys and values."""
    repacks_weights: ClassVar[bool] = False
    """The engine keeps a copy of the linear weights in its own layout, in addition to the model's."""
    default_correction: ClassVar[Literal["none", "truncate", "mask"]] = "none"
    """Importance-sampling correction if rollout.correction is null and max_staleness is 0."""

    answers_turns: ClassVar[bool] = False
    """`generate` asks `turns` what follows each turn. Around another engine, grpo/rollout/turn_rounds.py does so."""
    turns: Any = None
    """What follows a turn: a grpo.rollout.dialogue.Turns. None: completions have one turn."""
    prefilled_tokens: int = 0
    """Tokens of prompts, and between turns, that the last call of an engine that answers turns has computed."""

    @classmethod  # noqa: B027 (optional)
    def check(cls, config: Config) -> None:
        """Raise ConfigError for settings that this engine does not support."""

    @classmethod  # noqa: B027 (optional)
    def check_environment(cls, config: Config, processes: int) -> None:
        """Check for required libraries and servers before any weights are loaded.

        Args:
            config: the whole config.
            processes: number of ranks.

        Raises:
            ConfigError: a library or a server is missing.
        """

    @abstractmethod
    def generate(
        self, prompts: list[Prompt], plan: SamplingPlan, finished: Callable[[Group], None] | None = None
    ) -> list[Group]:
        """Sample plan.num_generations completions for each prompt.

        Args:
            prompts: prompts with their token ids.
            plan: number and maximum length of completions, temperature and seed.
            finished: called with each group as soon as its last completion is done, in any order. Groups can then be
                scored while others are still being sampled.

        Returns:
            One group per prompt, in the order of the prompts.
        """

    def description(self) -> str:
        """Return what the log says of how the engine computes, after a comma, or nothing."""
        return ""

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed run must know of the engine, as plain values."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:  # noqa: B027 (optional)
        """Restore what `state_dict` returned."""

    def free_memory(self) -> None:  # noqa: B027 (optional)
        """Free memory that is not needed until the next `update_weights`. Called before each update."""

    def give_up_memory(self) -> bool:
        """Free what `free_memory` keeps, now and before each later update: memory has run out in one.

        Returns:
            Whether there was anything to free.
        """
        return False

    def update_weights(self, step: int) -> None:  # noqa: B027 (no-op for engines that read the live weights)
        """Copy the model's weights, which are those after `step`. Collective if they are sharded."""


ENGINES: Registry[type[RolloutEngine]] = Registry("engine", "grpo.rollout", key="rollout.engine", modules="*_engine")
register_engine = ENGINES.register


def find_engine(name: str) -> type[RolloutEngine]:
    """Return the engine class for a registered name, package.module:Class or path/file.py:Class.

    Raises:
        ConfigError: there is none, or it does not inherit from RolloutEngine.
    """
    found = ENGINES.get(name)
    if not (isinstance(found, type) and issubclass(found, RolloutEngine)):
        raise ConfigError(
            f"rollout.engine is '{name}', which is not a subclass of grpo.rollout.engine.RolloutEngine: let it "
            "inherit from it"
        )
    return found


def check_engine(config: Config) -> None:
    """Check rollout.engine against the rest of the config.

    Raises:
        ConfigError: the engine does not exist, requires an unknown argument, or does not support the config.
    """
    name, staleness = config.rollout.engine, config.rollout.max_staleness
    engine = find_engine(name)
    offered = ("model", "tokenizer", *ARGUMENTS)
    check_arguments(f"rollout.engine '{name}'", engine, offered, config.rollout.engine_kwargs, "rollout.engine_kwargs")
    if staleness and not engine.supports_staleness:
        raise ConfigError(
            f"rollout.max_staleness is {staleness}, which rollout.engine {name} cannot do yet: set it to 0, or "
            f"the engine to native"
        )
    if engine.needs_packed_attention and config.model.attn_implementation != "grpo":
        raise ConfigError(
            f"model.attn_implementation is {config.model.attn_implementation}, but rollout.engine {name} decodes "
            f"with the attention called grpo: leave attn_implementation out, or set rollout.engine to transformers"
        )
    engine.check(config)
    ENGINES.check(name, config)


def build_engine(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    engine_kwargs: dict[str, Any] | None = None,
    **offered: Any,
) -> RolloutEngine:
    """Build the engine called `name`.

    Args:
        name: a registered name or a path (`find_engine`).
        model: the model to sample from.
        tokenizer: its tokenizer.
        engine_kwargs: further arguments of the constructor (rollout.engine_kwargs).
        **offered: values of ARGUMENTS. The constructor gets those that it names.
    """
    return call_with_supported_args(find_engine(name), {**offered, **(engine_kwargs or {})}, model, tokenizer)


def correction_of(rollout: RolloutConfig) -> str:
    """Return rollout.correction or its default: truncate if the sampling policy may be stale, else the engine's
    default.
    """
    if rollout.correction is not None:
        return rollout.correction
    return "truncate" if rollout.max_staleness else find_engine(rollout.engine).default_correction


def step_completions(config: Config, processes: int) -> int:
    """Return the number of completions that one of `processes` ranks samples at once in a training step."""
    sampling = config.sampling
    prompts = config.prompts_per_step * (sampling.oversample if sampling.dynamic_sampling else 1)
    return math.ceil(math.ceil(prompts) / processes) * sampling.num_generations


def longest_of(config: Config) -> int | None:
    """Return the tokens of the longest prompt and completion together. None if prompts have no limit."""
    if config.data.max_prompt_length is None:
        return None
    return config.data.max_prompt_length + config.sampling.max_completion_length


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all ids that end a completion: those of the generation config (a list for Llama-3) and the tokenizer's.

    Raises:
        ConfigError: there is none.
    """
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    found = {token for token in [*ids, tokenizer.eos_token_id] if token is not None}
    if not found:
        raise ConfigError(
            "neither the model's generation config nor its tokenizer names an end token, so no completion could ever "
            "end: set eos_token in tokenizer_config.json, or take a model that has one"
        )
    return sorted(found)


def saved_end_ids(name: str, tokenizer: PreTrainedTokenizerBase, gguf_file: str | None = None) -> list[int]:
    """Return all ids that end a completion, as `end_token_ids`, of a model that is not loaded."""
    found = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError, ValueError):  # a model without a generation config
        configured = GenerationConfig.from_pretrained(plain_model(name, gguf_file)).eos_token_id
        found |= set(configured if isinstance(configured, list) else [configured])
    return sorted(token for token in found if token is not None)


def hidden_token_ids(end_ids: Collection[int], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that are not part of a completion's text: end tokens, padding and the beginning of a text."""
    return {*end_ids, tokenizer.pad_token_id, getattr(tokenizer, "bos_token_id", None)} - {None}


def completion_text(token_ids: Sequence[int], hidden: Collection[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a completion as rewards read it. Special tokens stay, except `hidden` ones: <answer> may be one."""
    shown = [token for token in token_ids if token not in hidden]
    return str(tokenizer.decode(shown, skip_special_tokens=False))


def device_of(model: torch.nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device
