"""Reward functions of TRL: callables, names and reward models -> names and weights, and the functions behind them.

A function that other processes can import is known by its address, and runs in worker processes. Lambdas, closures,
functions of the script itself and reward models stay in this process, as in TRL: what they change remains changed.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo.data.rendering import apply_template
from grpo.errors import ConfigError
from grpo.rewards.registry import REWARDS, RewardFunction
from grpo.rewards.worker_process import address_of

MICRO_BATCH = 16
"""Completions that a reward model scores at once."""


@dataclass(frozen=True)
class Rewards:
    """The rewards of a run."""

    weights: dict[str, float]
    """Name -> weight, in the order of reward_funcs."""
    live: dict[str, RewardFunction]
    """Name -> function, for those that no other process can import."""


def rewards_of(reward_funcs: Any, weights: Sequence[float] | None, tokenizers: Any) -> Rewards:
    """Return names, weights and functions of `reward_funcs`.

    Args:
        reward_funcs: One or several of: a callable, the name of a reward, a sequence classification model or its id.
        weights: One for each; None: 1 each.
        tokenizers: reward_processing_classes: one for each, None for what is no model; or None.

    Raises:
        ConfigError: There is none, or the numbers do not fit.
    """
    funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not funcs or funcs == [None]:
        raise ConfigError("reward_funcs is empty: pass at least one reward function")
    own = [None] * len(funcs) if tokenizers is None else tokenizers
    own = list(own) if isinstance(own, list | tuple) else [own]
    for name, given in (("reward_weights", weights), ("reward_processing_classes", own)):
        if given is not None and len(given) != len(funcs):
            raise ConfigError(f"{name} has {len(given)} entries, needs one for each of the {len(funcs)} reward_funcs")
    named: dict[str, float] = {}
    live: dict[str, RewardFunction] = {}
    for func, weight, tokenizer in zip(funcs, weights or [1.0] * len(funcs), own, strict=True):
        name, function = _entry(func, tokenizer)
        base, number = name, 1
        while name in named:
            number += 1
            name = f"{base}_{number}"
        named[name] = float(weight)
        if function is not None:
            live[name] = function
        elif number > 1:
            live[name] = REWARDS.get(base)
    return Rewards(named, live)


def _entry(func: Any, tokenizer: Any) -> tuple[str, RewardFunction | None]:
    """Return the name of a reward, and its function where the name alone does not lead to it."""
    if isinstance(func, str):
        if ":" in func or func in REWARDS.names():
            REWARDS.get(func)  # raises ConfigError
            return func, None
        return _model_entry(load_reward_model(func), tokenizer)
    if isinstance(func, torch.nn.Module):
        return _model_entry(func, tokenizer)
    if not callable(func):
        raise ConfigError(
            f"reward_funcs has {func!r:.80} ({type(func).__name__}), needs to be a function, the name of a reward, or "
            f"a model for sequence classification"
        )
    plain = func
    while isinstance(plain, functools.partial):
        plain = plain.func
    label = str(getattr(plain, "__name__", type(plain).__name__))
    address = address_of(func) if plain is func else None
    if address is not None:
        return address, None
    return f"{getattr(plain, '__module__', None) or 'script'}:{label}", func


def load_reward_model(name: str) -> Any:
    """Load a model for sequence classification with one label. Raises ConfigError where it cannot be."""
    from transformers import AutoModelForSequenceClassification

    try:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"reward_funcs has '{name}', which is no registered reward ({', '.join(REWARDS.names())}), and cannot be "
            f"loaded as a model for sequence classification: {error}"
        ) from error


def _model_entry(model: Any, tokenizer: Any) -> tuple[str, RewardFunction]:
    name = str(model.config._name_or_path or type(model).__name__).rstrip("/").rpartition("/")[2]
    if tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return f"model:{name}", reward_model_function(model.eval().requires_grad_(False), tokenizer, name)


def reward_model_function(model: Any, tokenizer: Any, name: str) -> RewardFunction:
    """Return a reward function: the first logit of `model` for prompt and completion together."""

    def score(prompts: list[Any], completions: list[Any]) -> list[float | None]:
        from accelerate import PartialState

        model.to(PartialState().device)
        texts = [_text(prompt, completion, tokenizer) for prompt, completion in zip(prompts, completions, strict=True)]
        values: list[float | None] = []
        for start in range(0, len(texts), MICRO_BATCH):
            batch = tokenizer(
                texts[start : start + MICRO_BATCH],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            )
            with torch.inference_mode():
                logits = model(**batch.to(model.device)).logits
            values += logits[:, 0].float().tolist()
        return values

    score.__name__ = score.__qualname__ = name
    return score


def _text(prompt: Any, completion: Any, tokenizer: Any) -> str:
    """Return prompt and completion as one text; a chat through the template of the reward model."""
    if isinstance(prompt, str):
        return prompt + completion
    if prompt[-1]["role"] == "assistant":  # the completion holds the beginning of the answer
        prompt = prompt[:-1]
    [text] = apply_template([[*prompt, *completion]], tokenizer, {"continue_final_message": False}, tokenize=False)
    return str(text)
