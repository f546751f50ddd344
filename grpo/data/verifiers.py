"""Dataset verifiers: the rows of an environment of verifiers. Needs the extra `verifiers`.

    --data.name verifiers --data.dataset_kwargs '{environment: my-env}'
    --environment verifiers --environment_kwargs '{environment: my-env}' --rewards '{environment: 1.0}'

A row has the prompt of the environment (its system prompt included), the columns of its dataset, and the schemas of its
tools, which the chat template shows.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

from grpo.config.schema import DataConfig
from grpo.data.registry import Part, check_generated, register_dataset
from grpo.data.rows import Example
from grpo.errors import ConfigError
from grpo.types import Message

MISSING = "verifiers is missing, or has no MultiTurnEnv (versions 0.2 and 0.3 have): pip install verifiers==0.3.1"


def load_environment(environment: str, arguments: Mapping[str, Any] | None) -> Any:
    """Return an environment of verifiers, the same object in each call.

    Args:
        environment: Its id: the name of a module with `load_environment`.
        arguments: Arguments of `load_environment`.

    Raises:
        ConfigError: verifiers is not installed, or the environment cannot be loaded.
    """
    return _load(environment, json.dumps(dict(arguments or {}), sort_keys=True))


@functools.cache
def _load(environment: str, arguments: str) -> Any:
    try:
        import verifiers

        load = verifiers.load_environment
    except (ImportError, AttributeError) as error:
        raise ConfigError(MISSING) from error
    try:
        return load(environment, **json.loads(arguments))
    except Exception as error:  # code of the environment's author
        raise ConfigError(f"verifiers: environment '{environment}' cannot be loaded: {error}") from error


@register_dataset("verifiers", check=check_generated)
def verifiers(
    data: DataConfig, part: Part, seed: int, *, environment: str, arguments: Mapping[str, Any] | None = None
) -> list[Example]:
    """Return the rows of an environment's dataset, or of its evaluation dataset.

    Args:
        data: The config.
        part: train or held_out: [] where the environment has no evaluation dataset.
        seed: Seed of the run. The environment has its own.
        environment: Id of the environment.
        arguments: Arguments of its `load_environment`.

    Raises:
        ConfigError: It cannot be loaded, or has no dataset.
    """
    loaded = load_environment(environment, arguments)
    if part == "held_out":
        rows = loaded.build_eval_dataset() or []
    else:
        rows = loaded.build_dataset()
        if rows is None:
            raise ConfigError(f"verifiers: environment '{environment}' has no training dataset")
    return [_example(row, loaded) for row in rows]


def _example(row: Mapping[str, Any], loaded: Any) -> Example:
    messages = [plain_message(message) for message in row["prompt"]]
    columns = {key: value for key, value in row.items() if key != "prompt" and value is not None}
    columns.setdefault("question", messages[-1]["content"])
    if tools := tool_schemas(row.get("info"), loaded):
        columns["tools"] = tools
    return Example(messages, columns)


def tool_schemas(info: Any, loaded: Any) -> list[dict[str, Any]]:
    """Return the schemas of the tools of a row, or of its environment."""
    info = json.loads(info) if isinstance(info, str) else info
    tools = (info or {}).get("tool_defs") or loaded.tool_defs or []
    return [
        {"type": "function", "function": {key: tool[key] for key in ("name", "description", "parameters")}}
        for tool in tools
    ]


def plain_message(message: Any, names: Mapping[str, str] | None = None) -> Message:
    """Return a message of verifiers as {"role", "content"}; one of a tool with the name of its tool.

    Args:
        message: A dict, or a model of verifiers.types.
        names: Id of a call -> name of its tool.

    Raises:
        ValueError: The content is no text.
    """
    role, content = message["role"], message.get("content")
    if isinstance(content, list):
        parts = [dict(part) for part in content]
        if any(part.get("type") != "text" for part in parts):
            raise ValueError(f"a message of {role} has parts that are no text")
        content = "".join(part["text"] for part in parts)
    plain = {"role": str(role), "content": content or ""}
    if role == "tool":
        plain["name"] = (names or {}).get(message.get("tool_call_id"), "unknown")
    return plain
