r"""Tool calls: the text of a turn -> calls, in the format of the model.

    tags       <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>     Qwen, Hermes; several in a row
               <tool_call>[{"name": ...}, ...]</tool_call>                       SmolLM2
    json       {"name": "add", "parameters": {"a": 1}}                           Llama 3: the whole turn
               <|python_tag|>{"name": ...}; {"name": ...}                        Llama 3.1
    mistral    [TOOL_CALLS][{"name": ...}, ...]
    response   as the tokenizer's own response template parses it (transformers' parse_response)

Only a turn that the model has ended is parsed. A call that was cut off is truncated, not parsed.
"""

import contextlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

FORMATS = ("tags", "json", "mistral", "response")
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_MISTRAL = "[TOOL_CALLS]"
_PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class Call:
    """One call of a tool."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    """What is wrong with the call; None: nothing."""


def format_of(tokenizer: Any) -> str:
    """Return the format of calls that a tokenizer's chat template asks for."""
    if getattr(tokenizer, "response_template", None):
        return "response"
    template = str(getattr(tokenizer, "chat_template", None) or "")
    if "<tool_call>" in template:
        return "tags"
    if _MISTRAL in template:
        return "mistral"
    if _PYTHON_TAG in template or '"parameters": ' in template:
        return "json"
    return "tags"


def parse_calls(
    text: str,
    style: str,
    tokenizer: Any = None,
    *,
    tools: list[dict[str, Any]] | None = None,
    prefix: str = "",
) -> list[Call]:
    """Return the calls in a turn, in order. A call that cannot be read has an `error`.

    Args:
        text: the turn, without end tokens.
        style: one of FORMATS.
        tokenizer: for the format response.
        tools: schemas of the tools, for the format response.
        prefix: text before the turn, for the format response: it may begin a thought.
    """
    if style == "response":
        return _by_response_template(text, tokenizer, tools, prefix)
    if style == "tags":
        return [call for match in _TAGGED.finditer(text) for call in _from_json(match[1])]
    if style == "mistral":
        return _from_json(text.partition(_MISTRAL)[2]) if _MISTRAL in text else []
    tagged = _PYTHON_TAG in text
    body = text.rpartition(_PYTHON_TAG)[2].strip()
    if not tagged and not (body.startswith("{") and '"name"' in body):
        return []
    if tagged and not body.startswith("{"):
        return [Call("", error="only JSON calls are supported after <|python_tag|>")]
    return _several(body)


def _several(body: str) -> list[Call]:
    """Read objects that are separated by semicolons or space."""
    decoder, calls, place = json.JSONDecoder(), list[Call](), 0
    while place < len(body):
        try:
            value, end = decoder.raw_decode(body, place)
        except ValueError as error:
            return [*calls, Call("", error=f"the call is not valid JSON: {error}")]
        calls += _from_value(value)
        place = end + len(body[end:]) - len(body[end:].lstrip(" \n\t;"))
    return calls


def _from_json(body: str) -> list[Call]:
    try:
        value = json.loads(body)
    except ValueError as error:
        return [Call("", error=f"the call is not valid JSON: {error}")]
    return _from_value(value)


def _from_value(value: Any) -> list[Call]:
    if isinstance(value, list):
        return [call for one in value for call in _from_value(one)]
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return [Call("", error='a call must be {"name": ..., "arguments": {...}}')]
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # the error below says it
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        return [Call(value["name"], error="the arguments of a call must be a JSON object")]
    return [Call(value["name"], arguments)]


def _by_response_template(text: str, tokenizer: Any, tools: list[dict[str, Any]] | None, prefix: str) -> list[Call]:
    try:
        message = tokenizer.parse_response(text, prefix=prefix, tools=tools)
    except Exception as error:  # a parser of the tokenizer's author, on a text of the model
        return [Call("", error=f"the call cannot be parsed: {error!r:.200}")]
    return [call for one in message.get("tool_calls") or [] for call in _from_value(one)]
