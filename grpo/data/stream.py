"""Prompt stream: the prompts of any step, in an order that needs no saved state."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy

from grpo.errors import ConfigError
from grpo.types import Prompt


class PromptStream:
    """Endless, shuffled, counted order of prompts. The prompts of a step depend on the step number and the seed only.

    3 prompts a b c, 2 a step, 2 ranks:

        draw     0 1 | 2 3 | 4 5        draw d is prompt d % 3 of epoch d // 3's own order
        epoch    0 0   0 1   1 1
        prompt   b c | a a | c b        (epoch 0: b c a, epoch 1: a c b)
        rank     0 1 | 0 1 | 0 1        all ranks together get what one process would get
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, *, shuffle: bool = True):
        if not prompts:
            raise ConfigError("there are no prompts to draw from")
        self.prompts = prompts
        self.seed, self.shuffle = seed, shuffle
        self._orders: dict[int, numpy.ndarray] = {}

    def take(self, step: int, count: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """Return this rank's share of the step's `count` prompts."""
        return self.draws(step * count, count, rank, world_size)

    def draws(self, first: int, count: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """Return this rank's share of `count` prompts from draw `first` on."""
        return [self._draw(first + index) for index in range(rank, count, world_size)]

    def _draw(self, draw: int) -> Prompt:
        epoch, position = divmod(draw, len(self.prompts))
        return replace(self.prompts[int(self._order(epoch)[position])], draw=draw)

    def _order(self, epoch: int) -> numpy.ndarray:
        if epoch not in self._orders:
            count = len(self.prompts)
            order = shuffled(count, self.seed, epoch) if self.shuffle else numpy.arange(count)
            self._orders = {epoch: order}  # keeps the latest only
        return self._orders[epoch]

    def state_dict(self) -> dict[str, Any]:
        """Return {}: the order needs no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the order needs no state."""


def shuffled(count: int, seed: int, epoch: int) -> numpy.ndarray:
    """Return the epoch's permutation of 0 ... count - 1.

    Random bits are sorted instead of calling Generator.permutation: NumPy guarantees that Philox's bits stay the same
    in all versions, but not how permutation uses them, and a resumed run must see the same order.
    """
    key = numpy.array([seed % 2**64, epoch], dtype=numpy.uint64)
    return numpy.argsort(numpy.random.Philox(key=key).random_raw(count), kind="stable")
