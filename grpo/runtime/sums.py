"""Metric sums: sums and counts from every rank are added once, then divided once."""

import math
from collections import defaultdict

import torch
from torch import Tensor

from grpo.runtime.device import widest_float


class Sums:
    """Named pairs of (sum, count). All ranks' pairs are added in one collective.

    # add("length", 12, 2); add("length", 3, 1)  ->  means()["length"] == 15 / 3 == 5
    """

    def __init__(self) -> None:
        self._read: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._waiting: list[tuple[str, float | Tensor, float | Tensor]] = []
        """Pairs with tensors, which are read together: each read of its own would wait for the device."""

    def add(self, name: str, total: float | Tensor, count: float | Tensor = 1.0) -> None:
        """Add a sum of `count` values."""
        if isinstance(total, Tensor) or isinstance(count, Tensor):
            self._waiting.append((name, total, count))
        else:
            pair = self._totals[name]
            pair[0] += float(total)
            pair[1] += float(count)

    def merge(self, other: "Sums") -> None:
        """Add all pairs of `other`."""
        for name, (total, count) in other._totals.items():
            self.add(name, total, count)

    @property
    def _totals(self) -> dict[str, list[float]]:
        """The pairs as numbers, by name."""
        waiting, self._waiting = self._waiting, []
        tensors = [value.detach() for _, *pair in waiting for value in pair if isinstance(value, Tensor)]
        numbers = iter(_numbers(tensors))
        for name, *pair in waiting:
            for index, value in enumerate(pair):
                self._read[name][index] += next(numbers) if isinstance(value, Tensor) else float(value)
        return self._read

    def add_values(self, name: str, values: Tensor) -> None:
        """Add all values that are not NaN, and their squares (for `std`)."""
        known = values[~values.isnan()].to(torch.float64)
        self.add(name, known.sum(), known.numel())
        self.add(name + "^2", (known**2).sum(), known.numel())

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._totals)

    def tensor(self, names: list[str]) -> Tensor:
        """Return the pairs as float64 [len(names), 2], for an all-reduce."""
        return torch.tensor([self._totals[name] for name in names], dtype=torch.float64).reshape(-1, 2)

    def load(self, names: list[str], totals: Tensor) -> None:
        """Replace the pairs by those of `tensor`, after the all-reduce."""
        self._totals.update({name: list(pair) for name, pair in zip(names, totals.tolist(), strict=True)})

    def mean(self, name: str) -> float:
        """Return sum / count; 0 without values."""
        total, count = self._totals[name]
        return total / count if count else 0.0

    def count(self, name: str) -> float:
        """Return the number of values."""
        return self._totals[name][1]

    def total(self, name: str) -> float:
        """Return the sum."""
        return self._totals[name][0]

    def std(self, name: str) -> float:
        """Return the Bessel-corrected standard deviation of the values from `add_values`."""
        total, count = self._totals[name]
        squares = self._totals[name + "^2"][0]
        if count < 2:
            return 0.0
        return math.sqrt(max(0.0, (squares - total * total / count) / (count - 1)))


def _numbers(tensors: list[Tensor]) -> list[float]:
    """Return the values of scalar tensors, read from each device at once."""
    values = [0.0] * len(tensors)
    for device in {tensor.device for tensor in tensors}:
        here = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        stacked = torch.stack([tensors[index].to(widest_float(device)) for index in here]).tolist()
        for index, value in zip(here, stacked, strict=True):
            values[index] = value
    return values
