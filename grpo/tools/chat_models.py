"""Chat models: questions -> streamed answers, from one saved model or from two side by side.

A model reads a question as in training: the system prompt and the worked example of its run come first.
"""

from collections.abc import Iterator
from threading import Thread
from typing import Any, cast

import torch
from transformers import TextIteratorStreamer

from grpo.config.parser import load_config
from grpo.config.schema import DataConfig
from grpo.data.prompts import messages_for
from grpo.data.rendering import prompt_token_ids
from grpo.data.tokenizer import load_tokenizer
from grpo.models.loading import load_model
from grpo.rollout.engine import end_token_ids, hidden_token_ids
from grpo.tools.saved_model import run_config_file


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
    """One model that answers questions."""

    def __init__(self, path: str, data: DataConfig):
        self.path, self.data = path, data
        self.tokenizer = load_tokenizer(path)
        self.model = cast(Any, load_model(path))
        if torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())
        self.ends = end_token_ids(self.model, self.tokenizer)

    def stream_answer(
        self, question: str, *, max_completion_length: int = 512, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Yield the answer so far, longer each time. Temperature 0 is greedy."""
        ids = prompt_token_ids(messages_for(question, self.data), self.tokenizer, self.data.chat_template_kwargs)
        streamer = _Streamer(self.tokenizer, hidden_token_ids(self.ends, self.tokenizer))
        inputs = torch.tensor([ids], device=self.model.device)
        pad = self.tokenizer.pad_token_id
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                torch.manual_seed(seed)
                self.model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=max_completion_length,
                    do_sample=temperature > 0,
                    temperature=temperature if temperature > 0 else None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=self.ends,
                    pad_token_id=self.ends[0] if pad is None else pad,
                    streamer=streamer,
                )
            except BaseException as error:  # re-raised in the consumer
                failures.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        text = ""
        for piece in streamer:
            text += piece
            yield text
        thread.join()
        if failures:
            raise failures[0]
        yield text


def prompt_settings(model: str) -> DataConfig:
    """Return the data settings of the run that `model` belongs to, or settings without system prompt and example."""
    run_config = run_config_file(model)
    return load_config([f"--config={run_config}"]).data if run_config else DataConfig(system_prompt=None)


def load_chat_models(model: str, base: str | None = None) -> dict[str, ChatModel]:
    """Load {"base": ..., "trained": ...}, or {"trained": ...} alone. Both read prompts as in its run."""
    data = prompt_settings(model)
    chosen = {"base": base, "trained": model}
    return {name: ChatModel(path, data) for name, path in chosen.items() if path is not None}


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
