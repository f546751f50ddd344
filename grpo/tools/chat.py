"""Chat: questions -> answers as they are written, from one saved model or from two side by side.

The models read a question as they did in training: where a model folder lies in a run directory, that run's system prompt
and worked example are put before it.
"""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any, cast

import torch
from transformers import TextIteratorStreamer

from grpo.config.parser import load_config
from grpo.config.schema import DataConfig
from grpo.data.prompts import messages_for
from grpo.data.stream import prompt_token_ids
from grpo.data.tokenizer import load_tokenizer
from grpo.models.loading import load_model
from grpo.rollout.engine import end_token_ids


class Speaker:
    """One model that answers."""

    def __init__(self, path: str, data: DataConfig):
        self.path, self.data = path, data
        self.tokenizer = load_tokenizer(path)
        self.model = cast(Any, load_model(path))
        if torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())
        self.ends = end_token_ids(self.model, self.tokenizer)

    def answer(self, question: str, *, longest: int = 512, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """The answer so far, longer every time. Temperature 0 is greedy."""
        ids = prompt_token_ids(messages_for(question, self.data), self.tokenizer)
        # A special token is not printed: the answer is what rewards see.
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = torch.tensor([ids], device=self.model.device)
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                torch.manual_seed(seed)
                self.model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=longest,
                    do_sample=temperature > 0,
                    temperature=temperature if temperature > 0 else None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=self.ends,
                    pad_token_id=self.tokenizer.pad_token_id
                    if self.tokenizer.pad_token_id is not None
                    else self.ends[0],
                    streamer=streamer,
                )
            except BaseException as error:  # raised below, where somebody listens
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


def data_of(model: str) -> DataConfig:
    """The data settings of the run that the model folder lies in; else no system prompt and no example."""
    config = Path(model).parent / "config.yaml"
    if config.is_file():
        return load_config([f"--config={config}"]).data
    return DataConfig(system_prompt=None)


def speakers(model: str, base: str | None = None) -> dict[str, Speaker]:
    """{"base": ..., "trained": ...}, or {"trained": ...} alone; both read prompts as the trained model's run had them."""
    data = data_of(model)
    chosen = {"base": base, "trained": model}
    return {name: Speaker(path, data) for name, path in chosen.items() if path is not None}


def answers(
    by_name: dict[str, Speaker], question: str, *, longest: int = 512, temperature: float = 0.0, seed: int = 0
) -> Iterator[dict[str, str]]:
    """What each has written so far, token by token in turn, until all are done."""
    so_far = dict.fromkeys(by_name, "")
    writing = {
        name: speaker.answer(question, longest=longest, temperature=temperature, seed=seed)
        for name, speaker in by_name.items()
    }
    while writing:
        for name in list(writing):
            try:
                so_far[name] = next(writing[name])
            except StopIteration:
                del writing[name]
        yield dict(so_far)
