"""Streaming: rows are read, shuffled in a buffer and tokenised when they are drawn; nothing else is kept.

For data that does not fit on the disk or in memory, and to start at once. The order is that of the file (or of the hub's
shards), stirred by a buffer: less thorough than the shuffle of PromptStream, and the same whenever it is repeated.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

from grpo.config.schema import DataConfig
from grpo.data.files import Row, Table, iterate_rows
from grpo.data.rows import BadRows, Example, example_of, load_rows
from grpo.data.sources import is_hub_name
from grpo.data.stream import prompt_token_ids
from grpo.errors import ConfigError
from grpo.types import Prompt

PEEK = 1000
"""Rows that are looked at before training: is there an answer in them?"""


class StreamedPrompts:
    """An endless stream of prompts, taken in steps, one after the other. Its place is saved in the checkpoint."""

    def __init__(self, data: DataConfig, tokenizer: Any, seed: int, bad: BadRows | None = None):
        self.data, self.tokenizer, self.seed = data, tokenizer, seed
        self.bad = bad or BadRows(skip=data.bad_rows == "skip")
        self.epoch, self.rows = 0, 0
        """The epoch, and how many of its rows have been taken, whether they could be used or not."""
        self._next_draw = 0
        self._usable = 0
        self._iterator: Iterator[tuple[Row, str]] | None = None

    def take(self, step: int, count: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """This rank's share of the step's `count` prompts."""
        return self.draws(step * count, count, rank, world_size)

    def draws(self, first: int, count: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """This rank's share of `count` prompts from draw `first` on, which must be the next one. Every rank reads every
        row, so that all go in step."""
        assert first == self._next_draw, f"a stream goes forward only: {first} is not the next draw"
        drawn = []
        for index in range(count):
            prompt = self._next(self._next_draw)
            self._next_draw += 1
            if index % world_size == rank:
                drawn.append(prompt)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "rows": self.rows, "next_draw": self._next_draw, "usable": self._usable}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.rows = state["epoch"], state["rows"]
        self._next_draw, self._usable = state["next_draw"], state["usable"]
        self._iterator = None

    def _next(self, draw: int) -> Prompt:
        while True:
            if self._iterator is None:
                self._iterator = stirred(self._read, self.data.shuffle_buffer, f"{self.seed} {self.epoch}")
                for _ in range(self.rows):  # read, not tokenised: 60,000 rows take about a second
                    next(self._iterator)
            found = next(self._iterator, None)
            if found is None:
                if not self._usable:
                    raise ConfigError(f"data.path {self.data.path}: not one of its {self.rows} rows can be used")
                self.epoch, self.rows, self._iterator, self._usable = self.epoch + 1, 0, None, 0
                continue
            self.rows += 1
            example = example_of(*found, self.data, self.bad)
            if example is None:
                continue
            token_ids = prompt_token_ids(example.messages, self.tokenizer)
            if self.data.max_prompt_length is None or len(token_ids) <= self.data.max_prompt_length:
                self._usable += 1
                return Prompt(draw, example.messages, tuple(token_ids), example.columns)

    def _read(self) -> Iterator[tuple[Row, str]]:
        return read_rows(self.data, BadRows(skip=self.bad.skip))


def read_rows(data: DataConfig, bad: BadRows) -> Iterator[tuple[Row, str]]:
    """The rows of data.path with their places, one by one, from a file or from the hub."""
    if data.path is None:
        raise ConfigError("data.streaming is true, but data.path is null: it needs a file, or a dataset on the hub")
    if not is_hub_name(data.path):
        yield from iterate_rows(data.path, "data.path", bad)
        return
    import datasets

    try:
        rows = datasets.load_dataset(data.path, data.subset, split=data.split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield row, f"{data.path} ({data.split}), row {number}"
    except Exception as error:  # as in sources: the hub raises dozens of kinds
        raise ConfigError(f"data.path {data.path} ({data.split}) cannot be streamed: {error}") from error


def stirred(read: Callable[[], Iterator[Any]], size: int, seed: str) -> Iterator[Any]:
    """The items of `read()`, each kept in a buffer of `size` until its turn is drawn. The same seed, the same order."""
    chance = random.Random(seed)
    buffer: list[Any] = []
    for item in read():
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(chance.random() * size)
        buffer[place], item = item, buffer[place]
        yield item
    while buffer:
        place = int(chance.random() * len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        yield buffer.pop()


def peek(data: DataConfig, bad: BadRows) -> list[Example]:
    """The first PEEK rows as examples: what can be known before training. Raises ConfigError as load_examples does."""
    rows, places = [], []
    for row, place in read_rows(data, bad):
        rows.append(row)
        places.append(place)
        if len(rows) == PEEK:
            break
    return load_rows(Table(f"{data.path} (its first {len(rows)} rows)", rows, places), data, bad)
