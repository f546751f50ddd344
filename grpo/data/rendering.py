"""Rendering: messages -> chat template -> token ids -> Prompts.

Templates differ in what they do with a system message (refuse it, drop it), with the date and with thinking. Where a
template refuses or drops the system message, its text goes into the first user turn.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateError, meta

from grpo.data.rows import Example
from grpo.errors import ConfigError
from grpo.runtime.messages import visible
from grpo.types import Message, Prompt

log = logging.getLogger(__name__)

TODAY = datetime(2024, 7, 26)
"""Date for chat templates that write one into the prompt. A fixed one keeps prompts the same from day to day, in
training, on resume and in evaluation; this is the default of Llama 3's template."""
_TODAY_IN_TEMPLATE = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")
_SYSTEM, _USER = "SYSTEM9TEXT", "USER9TEXT"
TOOLS_TEXT = (
    "Tools that can be called, as JSON schemas:\n<tools>SCHEMAS\n</tools>\n\nTo call one, write its name and arguments "
    'as JSON in <tool_call> tags:\n<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
    "The result is in the next message."
)
"""System message of tools for a chat template that does not show them, with the tags of Qwen and Hermes."""
_system_in_user_turn: dict[tuple[str, str], bool] = {}
"""Template and its arguments -> whether a system message has to go into the user turn."""
_compared: set[str] = set()
"""Templates of which a first chat was compared with what the template made of it."""


def render_prompts(examples: list[Example], tokenizer: Any, max_prompt_length: int | None) -> tuple[list[Prompt], int]:
    """Tokenise the examples.

    Returns:
        The prompts, and the number of those left out as longer than `max_prompt_length` tokens. A prompt's `draw` is
        its index among the examples, whatever is left out.

    Raises:
        ConfigError: No prompt is left.
    """
    prompts: list[Prompt] = []
    shortest: int | None = None
    for index, example in enumerate(examples):
        token_ids = prompt_token_ids(example.messages, tokenizer, template_arguments(example.columns))
        shortest = len(token_ids) if shortest is None else min(shortest, len(token_ids))
        if max_prompt_length is None or len(token_ids) <= max_prompt_length:
            prompts.append(Prompt(index, example.messages, tuple(token_ids), example.columns))
    if not prompts:
        raise ConfigError(
            f"data.max_prompt_length is {max_prompt_length}, which leaves none of the {len(examples)} prompts (the "
            f"shortest has {shortest} tokens): raise it"
            if examples
            else "there are no examples to render into prompts"
        )
    return prompts, len(examples) - len(prompts)


def template_arguments(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row gives to the chat template: `chat_template_kwargs`, and `tools` where they are schemas.

    Raises:
        ConfigError: chat_template_kwargs is no mapping, or sets what the trainer sets.
    """
    given = columns.get("chat_template_kwargs")
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"column 'chat_template_kwargs' is {str(given)[:120]!r}, it must be a mapping or null")
    arguments = {key: value for key, value in (given or {}).items() if value is not None}
    for key in ("add_generation_prompt", "continue_final_message", "tokenize", "return_dict"):
        if key in arguments:
            raise ConfigError(f"column 'chat_template_kwargs' has '{key}', which the trainer sets: remove it")
    tools = columns.get("tools")
    if isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools):
        arguments["tools"] = tools
    return arguments


def prompt_token_ids(
    messages: str | list[Message], tokenizer: Any, arguments: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the model's input: the chat template applied, or plain text; at most one BOS token at the start.

    A last message of the assistant is left open: the completion continues it.

    Args:
        messages: The prompt.
        tokenizer: Its `chat_template` is applied.
        arguments: Further arguments of the template (see `template_arguments`).
    """
    if isinstance(messages, str):
        return _plain_token_ids(messages, tokenizer)
    arguments = arguments or {}
    if not _has_template(tokenizer):
        if arguments or any("tool_calls" in message for message in messages):
            raise ConfigError(
                "the data has tools, tool_calls or chat_template_kwargs, but the model has no chat template that "
                "could read them: remove them, or choose a model with a chat template"
            )
        return _plain_token_ids(_plain_text(messages), tokenizer)
    try:
        chat = _for_template(messages, tokenizer, arguments)
        _warn_of_lost_text(chat, tokenizer, arguments)
        [token_ids] = apply_template([chat], tokenizer, arguments)
    except (TemplateError, ValueError) as error:
        raise ConfigError(
            f"the model's chat template rejects the prompt: {error}; if it has no system role, set "
            f"data.system_prompt null"
        ) from error
    return _one_bos(list(token_ids), tokenizer)


def prompts_token_ids(
    many: Sequence[str | list[Message]], tokenizer: Any, arguments: Sequence[Mapping[str, Any]] | None = None
) -> list[list[int]]:
    """Return `prompt_token_ids` of many prompts, in parallel."""
    each = arguments or [{}] * len(many)
    chats = [messages for messages in many if not isinstance(messages, str) and messages[-1]["role"] != "assistant"]
    alike = len(chats) == len(many) and all(given == each[0] for given in each)
    if chats and alike and _has_template(tokenizer):
        first = prompt_token_ids(many[0], tokenizer, each[0])  # its error says more
        try:
            chats = [_for_template(chat, tokenizer, each[0]) for chat in chats]
            batch = apply_template(chats[1:], tokenizer, each[0]) if chats[1:] else []
            return [first, *(_one_bos(list(token_ids), tokenizer) for token_ids in batch)]
        except (TemplateError, ValueError):
            pass  # the error of the single prompt says more
    return [prompt_token_ids(messages, tokenizer, given) for messages, given in zip(many, each, strict=True)]


def apply_template(
    chats: list[list[Message]], tokenizer: Any, arguments: Mapping[str, Any], *, tokenize: bool = True
) -> list[Any]:
    """Return ids, or texts, of chats that end alike. Arguments win over the fixed date."""
    begun = chats[0][-1]["role"] == "assistant"
    given: dict[str, Any] = {"tokenize": tokenize, "return_dict": False}
    given |= {"add_generation_prompt": not begun, "continue_final_message": begun}
    if not _is_mistral_common(tokenizer):  # which refuses arguments that it does not know
        given["date_string"] = f"{TODAY:%d %b %Y}"
    template = tokenizer.chat_template
    if isinstance(template, str) and "strftime_now" in template:
        given["chat_template"] = _TODAY_IN_TEMPLATE.sub(lambda call: json.dumps(TODAY.strftime(call[2])), template)
    return list(tokenizer.apply_chat_template(chats, **(given | dict(arguments))))


def moves_system_text(tokenizer: Any, arguments: Mapping[str, Any]) -> bool:
    """Return whether the template refuses a system message or leaves it out. Logged once for each template."""
    if _is_mistral_common(tokenizer):
        return False
    key = (str(tokenizer.chat_template), json.dumps(arguments, sort_keys=True, default=str))
    if key not in _system_in_user_turn:
        user: Message = {"role": "user", "content": _USER}
        what = ""
        try:
            [text] = apply_template(
                [[{"role": "system", "content": _SYSTEM}, user]], tokenizer, arguments, tokenize=False
            )
            what = "" if _SYSTEM in text else "leaves out the system message"
        except (TemplateError, ValueError) as error:
            try:  # does it accept a chat without one?
                apply_template([[user]], tokenizer, arguments, tokenize=False)
                what = f"refuses a system message ({error})"
            except (TemplateError, ValueError):
                pass  # the prompt itself will say why
        if what:
            log.warning("the model's chat template %s: its text is put before the first question", what)
        _system_in_user_turn[key] = bool(what)
    return _system_in_user_turn[key]


def reads_tools(tokenizer: Any) -> bool:
    """Return whether the chat template shows the schemas of tools."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return "tool_use" in template
    return _is_mistral_common(tokenizer) or "tools" in str(template)


def check_template_kwargs(tokenizer: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting of data.chat_template_kwargs that the chat template does not read."""
    template = getattr(tokenizer, "chat_template", None)
    if not kwargs or not isinstance(template, str):
        return
    try:
        known = meta.find_undeclared_variables(Environment().parse(template))  # noqa: S701 (not rendered)
    except TemplateError:  # a tag of transformers' own
        return
    for key in kwargs:
        if key not in known and key != "tools":  # a template that does not read them gets TOOLS_TEXT
            own = {"messages", "tools", "documents", "add_generation_prompt"}
            reads = ", ".join(sorted(name for name in known - own if not name.endswith("_token")))
            raise ConfigError(
                f"data.chat_template_kwargs: the model's chat template does not read '{key}'"
                + (f"; it reads {reads}" if reads else "")
            )


def _for_template(chat: list[Message], tokenizer: Any, arguments: Mapping[str, Any]) -> list[Message]:
    """Return the chat as the template can read it: the system text may have to begin the first user turn.

    Schemas of tools that the template does not show are added to the system message.
    """
    if arguments.get("tools") and not reads_tools(tokenizer):
        system, rest = ([], chat) if chat[0]["role"] != "system" else ([chat[0]["content"]], chat[1:])
        schemas = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in arguments["tools"])
        text = TOOLS_TEXT.replace("SCHEMAS", schemas)
        chat = [{"role": "system", "content": "\n\n".join([*system, text])}, *rest]
    if chat[0]["role"] != "system" or len(chat) < 2 or chat[1]["role"] != "user":
        return chat
    if not moves_system_text(tokenizer, arguments):
        return chat
    return [{**chat[1], "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}, *chat[2:]]


def _warn_of_lost_text(chat: list[Message], tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Log once for each template that it changes or leaves out a message, such as the thinking of an earlier turn."""
    if str(tokenizer.chat_template) in _compared or _is_mistral_common(tokenizer):
        return
    _compared.add(str(tokenizer.chat_template))
    [text] = apply_template([chat], tokenizer, arguments, tokenize=False)
    for message in chat:
        content = str(message.get("content") or "").strip()
        if content not in str(text):
            shown = visible(content.replace("\n", " "))[:80]
            log.warning(
                "the chat template changes or leaves out a part of a turn of the %s: %r", message["role"], shown
            )


def _has_template(tokenizer: Any) -> bool:
    """Return whether the tokenizer renders chats. mistral-common does so without a template in Jinja."""
    return bool(tokenizer.chat_template) or _is_mistral_common(tokenizer)


def _is_mistral_common(tokenizer: Any) -> bool:
    return any(kind.__name__ in ("MistralCommonBackend", "MistralCommonTokenizer") for kind in type(tokenizer).__mro__)


def _plain_text(messages: list[Message]) -> str:
    r"""Return messages as text: "{system}\n\n{question}\n", a worked example "{question}\n{answer}\n\n" between."""
    endings = {"system": "\n\n", "assistant": "\n\n"}
    text = "".join(message["content"] + endings.get(message["role"], "\n") for message in messages)
    return text.removesuffix("\n\n") if messages[-1]["role"] == "assistant" else text


def _plain_token_ids(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of a text that goes on: with a BOS token, if the tokenizer adds one, and without an end token."""
    token_ids = list(tokenizer.encode(text, add_special_tokens=False))
    starts = list(tokenizer.encode(text, add_special_tokens=True))[:1]
    if tokenizer.bos_token_id is not None and starts == [tokenizer.bos_token_id]:
        token_ids = [tokenizer.bos_token_id, *token_ids]
    return _one_bos(token_ids, tokenizer)


def _one_bos(token_ids: list[int], tokenizer: Any) -> list[int]:
    """Remove repeated BOS tokens at the start."""
    bos = tokenizer.bos_token_id
    while bos is not None and token_ids[:2] == [bos, bos]:
        token_ids = token_ids[1:]
    return token_ids
