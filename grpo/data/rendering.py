"""Rendering: messages -> chat template -> token ids -> Prompts."""

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
        token_ids = prompt_token_ids(example.messages, tokenizer)
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


def prompt_token_ids(messages: str | list[Message], tokenizer: Any) -> list[int]:
    """Return the model's input: the chat template applied, or plain text; at most one BOS token at the start."""
    if isinstance(messages, str):
        return _plain_token_ids(messages, tokenizer)
    if not tokenizer.chat_template:
        return _plain_token_ids(_plain_text(messages), tokenizer)
    try:
        token_ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, date_string=DATE
        )
    except TemplateError as error:
        raise ConfigError(
            f"the model's chat template rejects the prompt: {error}; if it has no system role, set "
            f"data.system_prompt null"
        ) from error
    return _one_bos(list(token_ids), tokenizer)


def prompts_token_ids(many: list[str | list[Message]], tokenizer: Any) -> list[list[int]]:
    """Return `prompt_token_ids` of many prompts, in parallel."""
    if not tokenizer.chat_template or any(isinstance(messages, str) for messages in many):
        return [prompt_token_ids(messages, tokenizer) for messages in many]
    try:
        batch = tokenizer.apply_chat_template(
            many, add_generation_prompt=True, tokenize=True, return_dict=False, date_string=DATE
        )
    except TemplateError:
        return [prompt_token_ids(messages, tokenizer) for messages in many]  # its error names the prompt
    return [_one_bos(list(token_ids), tokenizer) for token_ids in batch]


def _plain_text(messages: list[Message]) -> str:
    r"""Return messages as text: "{system}\n\n{question}\n", a worked example "{question}\n{answer}\n\n" between."""
    endings = {"system": "\n\n", "assistant": "\n\n"}
    return "".join(message["content"] + endings.get(message["role"], "\n") for message in messages)


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
