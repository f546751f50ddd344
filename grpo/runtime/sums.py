"""Metric sums: sums and counts from every rank are added once, then divided once."""

import math
from collections import defaultdict

import torch
from torch import Tensor


class Sums:
    """Named pairs of (sum, count). All ranks' pairs are added in one collective.

    # add("length", 12, 2); add("length", 3, 1)  ->  means()["length"] == 15 / 3 == 5
    """

    def __init__(self) -> None:
        self._totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, total: float | Tensor, count: float | Tensor = 1.0) -> None:
        """Add a sum of `count` values."""
        pair = self._totals[name]
        pair[0] += float(total)
        pair[1] += float(count)

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
