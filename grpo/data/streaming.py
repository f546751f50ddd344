"""Streaming: rows are read, shuffled in a buffer and tokenised when they are drawn.

For data that does not fit on the disk or in memory, and for an immediate start. The order is that of the file (or of
the hub's shards), shuffled in a buffer: less thoroughly than in PromptStream, and reproducibly.
"""

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

from grpo.config.schema import DataConfig
from grpo.data.files import BadRows, Row, Table, iterate_rows
from grpo.data.hub import is_hub_name, stream_split
from grpo.data.registry import DATASETS
from grpo.data.rendering import prompt_token_ids, template_arguments
from grpo.data.rows import Example, example_of, load_rows, with_template_settings
from grpo.errors import ConfigError
from grpo.types import Prompt

log = logging.getLogger(__name__)

PEEK_ROWS = 1000
"""Rows that are checked before training."""


class StreamedPrompts:
    """Endless stream of prompts, taken one step after the other. Its position is saved in the checkpoint."""

    def __init__(self, data: DataConfig, tokenizer: Any, seed: int, bad: BadRows | None = None):
        self.data, self.tokenizer, self.seed = data, tokenizer, seed
        self.bad = bad or BadRows(skip=data.bad_rows == "skip")
        self.epoch, self.rows = 0, 0
        """The epoch, and the number of its rows that have been read, usable or not."""
        self._next_draw = 0
        self._usable = 0
        self._told = False
        self._iterator: Iterator[tuple[Row, str]] | None = None

    def take(self, step: int, count: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """Return this rank's share of the step's `count` prompts."""
        return self.draws(step * count, count, rank, world_size)

    def draws(self, first: int, count: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """Return this rank's share of `count` prompts from draw `first` on, which must be the next one.

        Every rank reads every row, so that all ranks stay in step.
        """
        assert first == self._next_draw, f"a stream goes forward only: {first} is not the next draw"
        drawn = []
        for index in range(count):
            prompt = self._next(self._next_draw)
            self._next_draw += 1
            if index % world_size == rank:
                drawn.append(prompt)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream."""
        return {"epoch": self.epoch, "rows": self.rows, "next_draw": self._next_draw, "usable": self._usable}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position from `state_dict`."""
        self.epoch, self.rows = state["epoch"], state["rows"]
        self._next_draw, self._usable = state["next_draw"], state["usable"]
        self._iterator = None

    def _next(self, draw: int) -> Prompt:
        while True:
            if self._iterator is None:
                size = self.data.shuffle_buffer if self.data.shuffle_dataset else 1
                self._iterator = buffer_shuffled(self._read, size, f"{self.seed} {self.epoch}")
                for _ in range(self.rows):  # read, not tokenised: 60,000 rows take about a second
                    next(self._iterator)
            found = next(self._iterator, None)
            if found is None:
                if not self._usable:
                    raise ConfigError(f"data.path {self.data.path}: none of its {self.rows} rows can be used")
                self.epoch, self.rows, self._iterator, self._usable = self.epoch + 1, 0, None, 0
                continue
            self.rows += 1
            row, place = found
            example: Example | None
            if isinstance(row, Example):
                example = with_template_settings(row, self.data)
            else:
                example = example_of(row, place, self.data, self.bad)
            if example is None:
                continue
            token_ids = prompt_token_ids(example.messages, self.tokenizer, template_arguments(example.columns))
            if self.data.max_prompt_length is None or len(token_ids) <= self.data.max_prompt_length:
                self._usable += 1
                return Prompt(draw, example.messages, tuple(token_ids), example.columns)
            if not self._told:
                self._told = True
                limit = self.data.max_prompt_length
                log.warning(
                    "%s has %d tokens, more than data.max_prompt_length %s: such rows are left out",
                    *(found[1], len(token_ids), limit),
                )

    def _read(self) -> Iterator[tuple[Row, str]]:
        return read_rows(self.data, BadRows(skip=self.bad.skip))


def read_rows(data: DataConfig, bad: BadRows) -> Iterator[tuple[Row, str]]:
    """Yield the rows of data.path with their places, one by one, from a file or from the hub."""
    own = getattr(DATASETS.get(data.name), "stream", None)
    if own is not None:  # a dataset that yields its Examples one by one
        yield from ((example, f"{data.name}, row {number}") for number, example in enumerate(own(), 1))
        return
    if data.path is None:
        raise ConfigError("data.streaming is true, but data.path is null: it needs a file, or a dataset on the hub")
    if is_hub_name(data.path):
        yield from stream_split(data.path, data.subset, data.split)
    else:
        yield from iterate_rows(data.path, "data.path", bad)


def buffer_shuffled(read: Callable[[], Iterator[Any]], size: int, seed: str) -> Iterator[Any]:
    """Yield the items of `read()`, shuffled in a buffer of `size` items. The same seed gives the same order."""
    rng = random.Random(seed)
    buffer: list[Any] = []
    for item in read():
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(rng.random() * size)
        buffer[place], item = item, buffer[place]
        yield item
    while buffer:
        place = int(rng.random() * len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        yield buffer.pop()


def peek(data: DataConfig, bad: BadRows) -> list[Example]:
    """Return the first PEEK_ROWS rows as examples. Raises ConfigError as `load_examples` does."""
    rows: list[Any] = []
    places: list[str] = []
    for row, place in read_rows(data, bad):
        rows.append(row)
        places.append(place)
        if len(rows) == PEEK_ROWS:
            break
    if rows and isinstance(rows[0], Example):
        return [with_template_settings(row, data) for row in rows]
    return load_rows(Table(f"{data.path} (its first {len(rows)} rows)", rows, places), data, bad)
