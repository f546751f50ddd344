"""Limits of a model that are known from its config: vocabulary, positions, end tokens. Checked before weights load."""

import logging
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from grpo.config.schema import Config
from grpo.data.gguf import plain_model
from grpo.errors import ConfigError
from grpo.models.architecture import text_config
from grpo.models.families import ROWS
from grpo.models.routers import COEFFICIENT, no_router_loss

log = logging.getLogger(__name__)

TABLES = frozenset(
    {"biogpt", "codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "gpt-sw3", "openai-gpt", "opt", "xglm"}
)
"""Model types with one row of a table for each position. A longer sequence reads outside of it."""
LENGTH_DEPENDENT = ("longrope", "dynamic")
"""Rotary embeddings whose frequencies change for all tokens once a sequence exceeds the original length."""


@dataclass
class Extent:
    """Longest prompt of a run, and largest token id in its prompts."""

    longest_prompt: int = 0
    largest_id: int = 0

    def add(self, token_ids: Any) -> None:
        """Count one prompt."""
        self.longest_prompt = max(self.longest_prompt, len(token_ids))
        self.largest_id = max(self.largest_id, max(token_ids, default=0))


def check_limits(
    config: Config, path: str, tokenizer: Any, extent: Extent, *, needs_packed_attention: bool = False
) -> None:
    """Check the prompts and lengths of a run against the limits of the model in `path`.

    Args:
        config: the config.
        path: folder or hub id of the model.
        tokenizer: its tokenizer.
        extent: of all prompts that are known.
        needs_packed_attention: rollout.engine runs no other models.

    Raises:
        ConfigError: a limit is exceeded.
    """
    path = plain_model(path, config.model.gguf_file)
    try:
        shape = text_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name '{path}' cannot be loaded: {error}") from error
    if needs_packed_attention and shape.model_type in ROWS:
        raise ConfigError(
            f"rollout.engine {config.rollout.engine} cannot run model.name '{path}': its family {shape.model_type} "
            f"{ROWS[shape.model_type]}. Set rollout.engine to transformers"
        )
    coefficient = config.objective.router_aux_loss_coef
    if coefficient and not hasattr(shape, COEFFICIENT):
        raise ConfigError(no_router_loss(coefficient, f"model.name '{path}' ({shape.model_type})"))
    _check_vocabulary(shape, path, tokenizer, extent)
    longest = extent.longest_prompt + config.sampling.max_completion_length
    if longest > config.tokens_per_batch:
        raise ConfigError(
            f"tokens_per_batch is {config.tokens_per_batch}, but the longest prompt has {extent.longest_prompt} tokens "
            f"and sampling.max_completion_length is {config.sampling.max_completion_length}: a batch holds at least "
            f"one of each. Set tokens_per_batch to at least {longest}, or data.max_prompt_length"
        )
    _check_positions(shape, path, longest, config)


def _check_vocabulary(shape: Any, path: str, tokenizer: Any, extent: Extent) -> None:
    size = getattr(shape, "vocab_size", None)
    if size is None:
        return
    if extent.largest_id >= size:
        token = tokenizer.convert_ids_to_tokens(extent.largest_id)
        raise ConfigError(
            f"a prompt contains token {extent.largest_id} ({token!r}), but model.name '{path}' has embeddings for "
            f"{size} tokens only: its tokenizer is that of another model, or tokens were added without "
            f"model.resize_token_embeddings. Use the tokenizer that belongs to the model"
        )
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, ValueError):
        configured = getattr(shape, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    named = [("tokenizer_config.json", tokenizer.eos_token_id), *(("generation_config.json", token) for token in ids)]
    for source, token in named:
        if token is not None and not 0 <= token < size:
            raise ConfigError(
                f"model.name '{path}': the end token {token} in {source} is outside the vocabulary of {size} tokens, "
                f"so no completion could end with it: correct eos_token there"
            )


def _check_positions(shape: Any, path: str, longest: int, config: Config) -> None:
    limit = getattr(shape, "max_position_embeddings", None)
    completion = config.sampling.max_completion_length
    remedy = (
        f"the longest prompt and sampling.max_completion_length {completion} make {longest}: lower one of them "
        f"(data.max_prompt_length)"
    )
    kind, original = _rope(shape)
    if shape.model_type in TABLES and limit is not None and longest > limit:
        raise ConfigError(f"model.name '{path}' has {limit} positions, but {remedy}")
    if kind in LENGTH_DEPENDENT and original is not None and longest > original:
        raise ConfigError(
            f"model.name '{path}' rotates by other frequencies as soon as a sequence exceeds {original} tokens "
            f"(rope_type {kind}), so a token's logprob would depend on the other sequences of its batch, but {remedy}"
        )
    if limit is not None and longest > limit:
        log.warning(f"model.name '{path}' was made for {limit} positions, and {remedy}, or expect worse completions")


def _rope(shape: PretrainedConfig) -> tuple[str | None, int | None]:
    """Return the type of the rotary embedding, and the length up to which its frequencies are the original ones."""
    rope = getattr(shape, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for part in parts:
        if part.get("rope_type") in LENGTH_DEPENDENT:
            original = part.get("original_max_position_embeddings")
            original = original or getattr(shape, "original_max_position_embeddings", None)
            return part["rope_type"], original or getattr(shape, "max_position_embeddings", None)
    return None, None
