"""Chat models: questions -> streamed answers, from one saved model or from two side by side.

A model reads a question as in training: the system prompt and the worked example of its run come first. With the tools
of its run, the answer has all turns, with the results between them.
"""

import logging
from collections.abc import Iterator
from threading import Thread
from typing import Any, cast

import torch
from transformers import TextIteratorStreamer

from grpo.config.parser import load_config
from grpo.config.schema import Config, DataConfig
from grpo.data.prompts import messages_for
from grpo.data.rendering import prompt_token_ids
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError
from grpo.models.loading import load_model
from grpo.rollout.dialogue import Turns, build_turns, offer_tools
from grpo.rollout.engine import end_token_ids, hidden_token_ids
from grpo.tools.saved_model import run_config_file
from grpo.types import Prompt

log = logging.getLogger(__name__)


class _Streamer(TextIteratorStreamer):
    """Streams the text of a completion as rewards read it: without end, padding and bos tokens only."""

    def __init__(self, tokenizer: Any, hidden: set[int]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False)
        self.hidden = hidden

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            value = torch.tensor([token for token in value.flatten().tolist() if token not in self.hidden])
            if not len(value):
                return
        super().put(value)


class ChatModel:
    """One model that answers questions.

    Args:
        path: its folder, or a hub id.
        data: how a question becomes a prompt.
        tools: a config with tools, which are run; None: no tool is run.
    """

    def __init__(self, path: str, data: DataConfig, tools: Config | None = None):
        self.path, self.data = path, data
        self.tokenizer = load_tokenizer(path)
        self.model = cast(Any, load_model(path))
        if torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())
        self.ends = end_token_ids(self.model, self.tokenizer)
        self.turns: Turns | None = None if tools is None else build_turns(tools, self.tokenizer, self.ends)

    def stream_answer(
        self, question: str, *, max_completion_length: int = 512, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Yield the answer so far, longer each time. Temperature 0 is greedy. The length counts all turns."""
        messages, settings = messages_for(question, self.data), self.data.chat_template_kwargs
        ids = prompt_token_ids(messages, self.tokenizer, settings)
        prompt = Prompt(0, messages, tuple(ids), {"chat_template_kwargs": settings})
        dialogue = None if self.turns is None else self.turns.dialogue(prompt, 0, 0, 1)
        text, tokens = "", list[int]()
        while True:
            turn: list[int] = []
            length = max_completion_length - len(tokens)
            for piece in self._stream_turn([*ids, *tokens], turn, length, temperature, seed):
                text += piece
                yield text
            tokens += turn
            if dialogue is None or not dialogue.end_turn(tokens, bool(turn) and turn[-1] in self.ends):
                break
            shown = len(dialogue.messages)
            given = dialogue.continuation(tokens, max_completion_length)
            for message in dialogue.messages[shown:]:
                text += f"\n[{message['role']} {message.get('name', '')}]\n{message['content']}\n"
            tokens += given
            if not given:
                break
            text += "[assistant]\n"
            yield text
        yield text

    def _stream_turn(
        self, ids: list[int], turn: list[int], length: int, temperature: float, seed: int
    ) -> Iterator[str]:
        """Yield the text of one turn piece by piece, and add its ids to `turn`."""
        streamer = _Streamer(self.tokenizer, hidden_token_ids(self.ends, self.tokenizer))
        inputs = torch.tensor([ids], device=self.model.device)
        pad = self.tokenizer.pad_token_id
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                torch.manual_seed(seed)
                found = self.model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=length,
                    do_sample=temperature > 0,
                    temperature=temperature if temperature > 0 else None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=self.ends,
                    pad_token_id=self.ends[0] if pad is None else pad,
                    streamer=streamer,
                )
                turn.extend(found[0, len(ids) :].tolist())
            except BaseException as error:  # re-raised in the consumer
                failures.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failures:
            raise failures[0]


def run_config(model: str) -> Config | None:
    """Return the config of the run that `model` belongs to; None: there is none."""
    file = run_config_file(model)
    return load_config([f"--config={file}"]) if file else None


def load_chat_models(model: str, base: str | None = None, *, with_tools: bool = False) -> dict[str, ChatModel]:
    """Load {"base": ..., "trained": ...}, or {"trained": ...} alone. Both read prompts as in its run.

    Args:
        model: the trained model.
        base: the other one.
        with_tools: run the tools of its run, which imports the files that its config names.

    Raises:
        ConfigError: `with_tools`, but its run has none.
    """
    config = run_config(model)
    data = config.data if config is not None else DataConfig(system_prompt=None)
    if with_tools:
        if config is None or not config.tools:
            raise ConfigError(f"--tools: {model} belongs to no run with tools: leave it out")
        offer_tools(config)
        data = config.data
    elif config is not None and config.tools:
        log.warning(
            "the run of %s has tools (%s), which are not run: --tools runs them", model, ", ".join(config.tools)
        )
    chosen = {"base": base, "trained": model}
    tools = config if with_tools else None
    return {name: ChatModel(path, data, tools) for name, path in chosen.items() if path is not None}


def stream_answers(
    models: dict[str, ChatModel],
    question: str,
    *,
    max_completion_length: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[dict[str, str]]:
    """Yield the answers so far by model name. Models take turns, one piece of text each."""
    so_far = dict.fromkeys(models, "")
    streams = {
        name: model.stream_answer(
            question, max_completion_length=max_completion_length, temperature=temperature, seed=seed
        )
        for name, model in models.items()
    }
    while streams:
        for name in list(streams):
            try:
                so_far[name] = next(streams[name])
            except StopIteration:
                del streams[name]
        yield dict(so_far)
