'''Tools: typed Python functions that the policy may call. Function -> JSON schema, call -> text of the result.

def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: For example "(17 + 5) * 3".
    """

The schema comes from the annotations and the docstring (transformers' get_json_schema). The result may be text,
or anything that JSON can hold. A tool may be async.
'''

import json
from collections.abc import Callable, Mapping
from typing import Any

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from grpo.errors import ConfigError
from grpo.registry import Registry
from grpo.rewards.calls import finished

Tool = Callable[..., Any]
TOOLS: Registry[Tool] = Registry("tool", "grpo.turns", key="tools")
register_tool = TOOLS.register


def find_tools(names: list[str], *, trust_model_code: bool = False) -> dict[str, Tool]:
    """Return the tools by the names that the policy calls them by: those of the functions.

    Args:
        names: registered names, package.module:function, or path/file.py:function.
        trust_model_code: allow tools that run code of the model.

    Raises:
        ConfigError: a tool does not exist, has no schema, runs code of the model, or two have one name.
    """
    found: dict[str, Tool] = {}
    for name in names:
        function = TOOLS.get(name)
        called = tool_name(function)
        if called in found:
            raise ConfigError(f"tools: two tools are called '{called}': rename one of the functions")
        schema_of(name, function)
        if getattr(function, "runs_model_code", False) and not trust_model_code:
            raise ConfigError(
                f"tools: '{name}' runs code that the model writes, as this user: set turns.trust_model_code true if "
                f"this machine holds nothing that such code may read or change"
            )
        found[called] = function
    return found


def tool_name(function: Tool) -> str:
    """Return the name by which the policy calls a tool."""
    return str(getattr(function, "__name__", type(function).__name__))


def schema_of(name: str, function: Tool) -> dict[str, Any]:
    """Return the JSON schema of a tool.

    Raises:
        ConfigError: annotations, or the text of an argument, are missing.
    """
    try:
        return dict(get_json_schema(function))
    except (DocstringParsingException, TypeHintParsingException, TypeError, ValueError) as error:
        raise ConfigError(
            f"tools: '{name}' has no schema ({error}): annotate each argument, and describe the function and each "
            f"argument in its docstring, below 'Args:'"
        ) from error


def call_tool(function: Tool, arguments: Mapping[str, Any]) -> str:
    """Call a tool and return its result as text.

    Raises:
        Exception: whatever the tool raises. TypeError for arguments that it does not take.
    """
    result = finished(function(**arguments))
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


def runs_model_code(function: Tool) -> Tool:
    """Decorator for a tool that runs code of the model: refused without turns.trust_model_code."""
    function.runs_model_code = True  # type: ignore[attr-defined]
    return function
