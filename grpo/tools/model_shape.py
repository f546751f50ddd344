"""A model's shape and tokenizer, without its weights."""

import random

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.schema import Config
from grpo.data.gguf import plain_model
from grpo.data.rows import Example
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError
from grpo.models.architecture import create_model, vocabulary_size
from grpo.models.reference import check_vocabulary
from grpo.models.tiny import GSM8K_RECIPE, Recipe, completion_text, generate_problems, make_model, make_tokenizer


def tokenizer_and_shape(config: Config, rows: list[Example]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return the tokenizer, and the model on the "meta" device.

    Args:
        config: `model.name` is a folder, a hub id, or "starter" for the tiny model, which is built without warm-up.
        rows: Training rows; the tiny model's tokenizer is made from them.

    Raises:
        ConfigError: The model's config or tokenizer cannot be loaded.
    """
    name = config.model.name
    if name == "starter":
        return _tiny_model(config, rows)
    plain = plain_model(name, config.model.gguf_file)
    return load_tokenizer(name, config.model.gguf_file), _shape("model.name", name, plain)


def check_reference(config: Config, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Check that the model of model.reference can be loaded and has the vocabulary of the policy, as `train` does.

    Raises:
        ConfigError: It cannot, or has not.
    """
    name = config.model.reference
    if name is None:
        return
    reference = _shape("model.reference", name, plain_model(name))
    check_vocabulary(vocabulary_size(model), vocabulary_size(reference), tokenizer, load_tokenizer(name), name)


def _shape(key: str, name: str, path: str) -> PreTrainedModel:
    """Return the model in `path` on the "meta" device. `key` and `name` are for the message of an error."""
    try:
        shape = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            return create_model(shape, path=name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key} '{name}' cannot be loaded: {error}") from error


def _tiny_model(config: Config, rows: list[Example]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    if config.data.name == "arithmetic":
        recipe = Recipe()
        problems = generate_problems(recipe.problems, seed=config.seed, split="train")
    else:
        recipe = GSM8K_RECIPE
        problems = [_problem(row) for row in rows]
    chance = random.Random(f"starter {config.seed}")
    texts = [(row["question"], completion_text(row["answer"], recipe, chance)) for row in problems]
    tokenizer = make_tokenizer([part for text in texts for part in text], recipe.vocabulary)
    with torch.device("meta"):
        return tokenizer, make_model(tokenizer, recipe)


def _problem(row: Example) -> dict[str, str]:
    return {
        "question": str(row.columns.get("question", "")),
        "answer": str(row.columns.get("solution") or row.columns.get("answer") or ""),
    }
