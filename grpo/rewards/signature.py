"""Signatures of reward functions: their arguments come from the data's columns and from `reward_kwargs`.

Checked before a run starts, so that a missing column or a misspelled argument costs no training time.
"""

import difflib
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from grpo.config.values import has_type
from grpo.errors import ConfigError
from grpo.rewards.context import CONTEXT_ARGUMENTS
from grpo.rewards.registry import RewardFunction
from grpo.types import Completion, Group, Message, Prompt, prefill_of

STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "environment_reward")
"""Passed to every reward that names them. Any other argument is a column of the data, or set by `reward_kwargs`."""


def check_kwargs(name: str, function: RewardFunction, kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `kwargs` are named parameters of the function, of the annotated types.

    `**columns` in a signature accepts no keyword argument from the config: it collects the data's columns, so a typing
    mistake would go unnoticed.
    """
    parameters = inspect.signature(function).parameters
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    given = (*STANDARD_ARGUMENTS, *CONTEXT_ARGUMENTS)
    accepted = [key for key, p in parameters.items() if p.kind in by_name and key not in given]
    annotations = _annotations(function)
    for key, value in kwargs.items():
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ConfigError(
                f"reward_kwargs: reward '{name}' has no argument '{key}': {hint}It accepts "
                f"{', '.join(accepted) or 'none'}"
            )
        annotation = annotations.get(key, Any)
        if not has_type(value, annotation):
            expected = getattr(annotation, "__name__", None) or str(annotation)
            raise ConfigError(f"reward_kwargs: argument '{key}' of reward '{name}' is {value!r}, needs {expected}")


def check_columns(name: str, function: RewardFunction, kwargs: Mapping[str, Any], columns: set[str]) -> None:
    """Raise ConfigError if the function cannot be called with these columns of the data and these keyword arguments."""
    there = ", ".join(sorted(columns)) or "none"
    for key in kwargs:
        if key in columns:
            raise ConfigError(
                f"reward_kwargs: argument '{key}' of reward '{name}' is also a column of the data (columns there: "
                f"{there}): rename the argument or the column"
            )
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        given = {*STANDARD_ARGUMENTS, *CONTEXT_ARGUMENTS, *columns, *kwargs}
        if parameter.name not in given and parameter.default is parameter.empty:
            raise ConfigError(
                f"reward '{name}' needs the column '{parameter.name}', which the data does not have "
                f"(columns there: {there}): choose another reward, or add the column to every row"
            )


def column_arguments(function: RewardFunction, groups: list[Group], kwargs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the arguments that have one entry per completion, as flat lists of P * G entries.

    The answer that a prompt begins (a last message of the assistant) is part of the completion.

    The function gets those that it names, or all of them with `**columns`, but none that `kwargs` sets.
    """
    pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
    columns = dict.fromkeys(column for group in groups for column in group.prompt.columns)  # a set, in order
    arguments: dict[str, list[Any]] = {
        column: [prompt.columns.get(column) for prompt, _ in pairs] for column in columns
    }
    arguments["prompts"] = [prompt.messages for prompt, _ in pairs]
    arguments["completions"] = [
        completion.text if isinstance(prompt.messages, str) else completion_messages(prompt, completion)
        for prompt, completion in pairs
    ]
    if any(completion.turns for _, completion in pairs):
        arguments["environment_reward"] = [completion.turns.get("reward") for _, completion in pairs]
    arguments["completion_ids"] = [completion.token_ids for _, completion in pairs]
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {key: v for key, v in arguments.items() if (takes_all or key in parameters) and key not in kwargs}


def completion_messages(prompt: Prompt, completion: Completion) -> list[Message]:
    """Return the messages of a completion: one of the assistant, or all of several turns."""
    turns = completion.turns.get("messages") or [{"role": "assistant", "content": completion.text}]
    turns = [{key: value for key, value in message.items() if key != "tokens"} for message in turns]
    return [{**turns[0], "content": prefill_of(prompt.messages) + turns[0]["content"]}, *turns[1:]]


def _annotations(function: RewardFunction) -> dict[str, Any]:
    """Return the resolved annotations; {} where they name something that cannot be resolved."""
    try:
        return typing.get_type_hints(inspect.unwrap(function))
    except Exception:
        return {}
