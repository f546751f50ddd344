"""The stream: Examples -> Prompts (token ids) -> the prompts of any step, in an order that needs no saved state."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy
from jinja2 import TemplateError

from grpo.data.rows import Example
from grpo.errors import ConfigError
from grpo.types import Message, Prompt

DATE = "26 Jul 2024"
"""Llama 3's chat template writes today's date into the prompt. A fixed one keeps prompts the same from day to day; this
is the date that the template itself falls back to."""


def render_prompts(examples: list[Example], tokenizer: Any, max_prompt_length: int | None) -> tuple[list[Prompt], int]:
    """Examples -> (prompts, how many were left out as longer than max_prompt_length tokens).

    A prompt's draw is its index among the examples, so it stays the same whatever is left out. Raises ConfigError
    where nothing is left.
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
    """The ids that the model is fed: the chat template applied, or plain text; at most one BOS token at the start."""
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
            f"the model's chat template refuses the prompt: {error}; if it knows no system role, set "
            f"data.system_prompt null"
        ) from error
    return _one_bos(list(token_ids), tokenizer)


def prompts_token_ids(many: list[str | list[Message]], tokenizer: Any) -> list[list[int]]:
    """The same for many prompts at once, which is quicker: the tokenizer works on them in parallel."""
    if not tokenizer.chat_template or any(isinstance(messages, str) for messages in many):
        return [prompt_token_ids(messages, tokenizer) for messages in many]
    try:
        batch = tokenizer.apply_chat_template(
            many, add_generation_prompt=True, tokenize=True, return_dict=False, date_string=DATE
        )
    except TemplateError:
        return [prompt_token_ids(messages, tokenizer) for messages in many]  # says which, and what to do
    return [_one_bos(list(token_ids), tokenizer) for token_ids in batch]


def _plain_text(messages: list[Message]) -> str:
    r"""[system, question] -> "{system}\n\n{question}\n"; a worked example in between: "{question}\n{answer}\n\n"."""
    endings = {"system": "\n\n", "assistant": "\n\n"}
    return "".join(message["content"] + endings.get(message["role"], "\n") for message in messages)


def _plain_token_ids(text: str, tokenizer: Any) -> list[int]:
    """The text's ids, after a BOS token if this tokenizer starts its texts with one. Never an end token: the prompt
    goes on."""
    token_ids = list(tokenizer.encode(text, add_special_tokens=False))
    starts = list(tokenizer.encode(text, add_special_tokens=True))[:1]
    if tokenizer.bos_token_id is not None and starts == [tokenizer.bos_token_id]:
        token_ids = [tokenizer.bos_token_id, *token_ids]
    return _one_bos(token_ids, tokenizer)


def _one_bos(token_ids: list[int], tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    while bos is not None and token_ids[:2] == [bos, bos]:
        token_ids = token_ids[1:]
    return token_ids


class PromptStream:
    """An endless, shuffled, counted order of prompts: what step 1000 gets follows from its number alone.

    3 prompts a b c, 2 a step, 2 ranks:

        draw     0 1 | 2 3 | 4 5        draw d is prompt d % 3 of epoch d // 3's own order
        epoch    0 0   0 1   1 1
        prompt   b c | a a | c b        (epoch 0: b c a, epoch 1: a c b)
        rank     0 1 | 0 1 | 0 1        so the ranks together get what one process would get

    A resumed run needs the step and the seed, nothing else.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        if not prompts:
            raise ConfigError("there are no prompts to draw from")
        self.prompts = prompts
        self.seed = seed
        self._orders: dict[int, numpy.ndarray] = {}

    def take(self, step: int, count: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """This rank's share of the step's `count` prompts, each with its draw as identity."""
        return self.draws(step * count, count, rank, world_size)

    def draws(self, first: int, count: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """This rank's share of `count` prompts from draw `first` on."""
        return [self._draw(first + index) for index in range(rank, count, world_size)]

    def _draw(self, draw: int) -> Prompt:
        epoch, position = divmod(draw, len(self.prompts))
        return replace(self.prompts[int(self._order(epoch)[position])], draw=draw)

    def _order(self, epoch: int) -> numpy.ndarray:
        if epoch not in self._orders:
            self._orders = {epoch: shuffled(len(self.prompts), self.seed, epoch)}  # Only the latest is worth memory.
        return self._orders[epoch]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step says it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See state_dict."""


def shuffled(count: int, seed: int, epoch: int) -> numpy.ndarray:
    """The epoch's permutation of 0 ... count - 1.

    Sorted random bits instead of Generator.permutation: NumPy promises that Philox's bits stay the same from version to
    version, not that permutation uses them the same way, and a resumed run must see the same order.
    """
    key = numpy.array([seed % 2**64, epoch], dtype=numpy.uint64)
    return numpy.argsort(numpy.random.Philox(key=key).random_raw(count), kind="stable")
