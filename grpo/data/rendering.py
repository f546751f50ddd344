"""Rendering: messages -> chat template -> token ids -> Prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from grpo.data.rows import Example
from grpo.errors import ConfigError
from grpo.types import Message, Prompt

DATE = "26 Jul 2024"
"""Date for chat templates that write one into the prompt (Llama 3). A fixed one keeps prompts the same from day to day;
this is the template's own default."""


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
    if not tokenizer.chat_template:
        if arguments or any("tool_calls" in message for message in messages):
            raise ConfigError(
                "the data has tools, tool_calls or chat_template_kwargs, but the model has no chat template that "
                "could read them: remove them, or choose a model with a chat template"
            )
        return _plain_token_ids(_plain_text(messages), tokenizer)
    begun = messages[-1]["role"] == "assistant"
    settings = {"date_string": DATE, **(arguments or {})}
    try:
        token_ids = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not begun,
            continue_final_message=begun,
            tokenize=True,
            return_dict=False,
            **settings,
        )
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
    plain = not any(each) and all(
        not isinstance(messages, str) and messages[-1]["role"] != "assistant" for messages in many
    )
    if tokenizer.chat_template and plain:
        try:
            batch = tokenizer.apply_chat_template(
                many, add_generation_prompt=True, tokenize=True, return_dict=False, date_string=DATE
            )
            return [_one_bos(list(token_ids), tokenizer) for token_ids in batch]
        except (TemplateError, ValueError):
            pass  # the error of the single prompt says more
    return [prompt_token_ids(messages, tokenizer, given) for messages, given in zip(many, each, strict=True)]


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
