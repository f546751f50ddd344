"""A conversation with tools or an environment as the model will read it, before weights load.

    prompt    <|im_start|>system ... <tools>{"type": "function", ...}</tools> ... <|im_start|>assistant
    sampled   <tool_call>{"name": "calculator", "arguments": {"expression": "..."}}</tool_call><|im_end|>
    given     <|im_start|>user<tool_response>...</tool_response><|im_end|><|im_start|>assistant

Tools are not called. An environment is reset, and answers one turn, in a process with the deadline of training.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from grpo.config.schema import Config
from grpo.data.rendering import apply_template, prompt_token_ids, template_arguments
from grpo.data.rows import Example
from grpo.errors import EngineError
from grpo.rollout.dialogue import build_turns, has_turns
from grpo.rollout.engine import saved_end_ids
from grpo.tools.check_result import Check, TurnPart
from grpo.turns.calls import format_of, parse_calls
from grpo.turns.template import TurnTemplate
from grpo.types import Message, Prompt

SHOWN_TURN = "(the model's turn)"
RESULT = "(the result of {name})"
EXAMPLES: dict[str, Any] = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
"""JSON type -> an example. Text is three dots."""


def end_ids_of(config: Config, tokenizer: Any) -> list[int]:
    """Return the ids that end a turn of the model that `config` names, without its weights."""
    if config.model.name == "starter":
        return [tokenizer.eos_token_id]
    return saved_end_ids(config.model.name, tokenizer, config.model.gguf_file)


def check_conversation(found: Check, config: Config, example: Example, tokenizer: Any) -> None:
    """Add a conversation to `found`, with problems and warnings. Does nothing without tools and environment."""
    if not has_turns(config):
        return
    ends = end_ids_of(config, tokenizer)
    if config.environment:
        _add_environment(found, config, example, tokenizer, ends)
    else:
        _add_call(found, config, example, tokenizer, ends)


def _add_call(found: Check, config: Config, example: Example, tokenizer: Any, ends: Sequence[int]) -> None:
    arguments = template_arguments(example.columns)
    [schema, *_] = arguments.get("tools") or [{"function": {"name": config.tools[0].rpartition(":")[2]}}]
    function = schema["function"]
    name, example_arguments = str(function["name"]), example_call(function)
    style = format_of(tokenizer)
    written = written_call(tokenizer, name, example_arguments, arguments, ends)
    call = written if written is not None else call_text(style, name, example_arguments)
    parsed = parse_calls(call, style, tokenizer, tools=arguments.get("tools"))
    if [(one.name, one.arguments, one.error) for one in parsed] != [(name, example_arguments, None)]:
        found.warnings.append(
            f"the calls that the chat template writes are not those that are parsed (format {style}): {call!r:.200} is "
            f"read as {parsed!r:.200}: results of tools may never come"
        )
    prompt = prompt_token_ids(example.messages, tokenizer, arguments)
    given = TurnTemplate(tokenizer, ends).given_ids([_result(name)], arguments)
    found.conversation = [
        TurnPart("prompt", str(tokenizer.decode(prompt)), len(prompt)),
        _sampled(call, tokenizer, ends),
        TurnPart("given", str(tokenizer.decode(given)), len(given)),
        _sampled(SHOWN_TURN, tokenizer, ends),
    ]
    if not arguments.get("tools"):
        found.warnings.append("turns.show_tools is false: the prompt must describe the tools and the format of calls")


def _add_environment(found: Check, config: Config, example: Example, tokenizer: Any, ends: Sequence[int]) -> None:
    turns = build_turns(config, tokenizer, ends)
    assert turns is not None
    ids = prompt_token_ids(example.messages, tokenizer, template_arguments(example.columns))
    try:
        [prompt] = turns.begin([Prompt(0, example.messages, tuple(ids), example.columns)], 1)
        dialogue = turns.dialogue(prompt, 0, 0, 1)
        turn = [*tokenizer(SHOWN_TURN, add_special_tokens=False)["input_ids"], ends[0]]
        begun = dialogue.end_turn(turn, True)
        given = dialogue.continuation(turn, 10**9) if begun else []
    except EngineError as error:
        found.problems.append(str(error))
        return
    finally:
        turns.close()
    if dialogue.failures:
        found.warnings.append(f"environment: a step with the turn {SHOWN_TURN!r} failed, or took too long")
    limit = config.data.max_prompt_length
    if limit is not None and len(prompt.token_ids) > limit:
        found.warnings.append(
            f"environment: the first prompt has {len(prompt.token_ids)} tokens after reset, which is more than "
            f"data.max_prompt_length {limit}: raise it, so that tokens_per_batch and the cache are large enough"
        )
    found.conversation = [
        TurnPart("prompt", str(tokenizer.decode(prompt.token_ids)), len(prompt.token_ids)),
        _sampled(SHOWN_TURN, tokenizer, ends),
    ]
    if given:
        found.conversation.append(TurnPart("given", str(tokenizer.decode(given)), len(given)))


def example_call(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example of each required argument of a function's schema."""
    parameters = function.get("parameters", {})
    properties = parameters.get("properties", {})
    return {name: _example(properties.get(name, {})) for name in parameters.get("required", [])}


def _example(schema: Mapping[str, Any]) -> Any:
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    return EXAMPLES.get(kind[0] if isinstance(kind, list) else str(kind), "...")


def _result(name: str) -> Message:
    return {"role": "tool", "name": name, "content": RESULT.format(name=name)}


def written_call(
    tokenizer: Any, name: str, call: Mapping[str, Any], arguments: Mapping[str, Any], ends: Sequence[int]
) -> str | None:
    """Return a call as the chat template writes it, without the end of the turn. None: the template writes none."""
    asked: list[Message] = [{"role": "user", "content": "USER9TEXT"}]
    made = {"type": "function", "function": {"name": name, "arguments": dict(call)}}
    chat = [*asked, {"role": "assistant", "content": "", "tool_calls": [made]}, _result(name)]
    try:
        [before], [whole] = (apply_template([one], tokenizer, arguments, tokenize=False) for one in (asked, chat))
    except (TemplateError, ValueError, TypeError):
        return None
    turn = whole.removeprefix(before)
    stops = [turn.find(text) for text in map(str, tokenizer.convert_ids_to_tokens(list(ends))) if text in turn]
    if turn == whole or not stops or name not in turn[: min(stops)]:
        return None
    return str(turn[: min(stops)])


def call_text(style: str, name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call in one of the formats of grpo.turns.calls, for a template that writes none."""
    if style == "json":
        return json.dumps({"name": name, "parameters": arguments})
    call = json.dumps({"name": name, "arguments": arguments})
    return f"[TOOL_CALLS][{call}]" if style == "mistral" else f"<tool_call>\n{call}\n</tool_call>"


def _sampled(text: str, tokenizer: Any, ends: Sequence[int]) -> TurnPart:
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    whole = f"{text}{tokenizer.convert_ids_to_tokens(end)}"
    return TurnPart("sampled", whole, len(tokenizer(whole, add_special_tokens=False)["input_ids"]))
