"""Metrics: token and completion sums -> means. Sums from every rank are added once, then divided once."""

import math
from collections import defaultdict

import torch
from torch import Tensor


class Sums:
    """Named pairs of (sum, count). Ranks add theirs up in one collective, however many metrics there are.

    # add("length", 12, 2); add("length", 3, 1)  ->  means()["length"] == 15 / 3 == 5
    """

    def __init__(self) -> None:
        self._totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, total: float | Tensor, count: float | Tensor = 1.0) -> None:
        pair = self._totals[name]
        pair[0] += float(total)
        pair[1] += float(count)

    def add_values(self, name: str, values: Tensor) -> None:
        """All values that are not NaN, and their squares (for `std`)."""
        known = values[~values.isnan()].to(torch.float64)
        self.add(name, known.sum(), known.numel())
        self.add(name + "^2", (known**2).sum(), known.numel())

    def names(self) -> list[str]:
        return sorted(self._totals)

    def tensor(self, names: list[str]) -> Tensor:
        """[len(names), 2] float64: what an all-reduce adds up."""
        return torch.tensor([self._totals[name] for name in names], dtype=torch.float64).reshape(-1, 2)

    def load(self, names: list[str], totals: Tensor) -> None:
        self._totals.update({name: list(pair) for name, pair in zip(names, totals.tolist(), strict=True)})

    def mean(self, name: str) -> float:
        total, count = self._totals[name]
        return total / count if count else 0.0

    def total(self, name: str) -> float:
        return self._totals[name][0]

    def std(self, name: str) -> float:
        """Bessel-corrected standard deviation of what `add_values` was given."""
        total, count = self._totals[name]
        squares = self._totals[name + "^2"][0]
        if count < 2:
            return 0.0
        return math.sqrt(max(0.0, (squares - total * total / count) / (count - 1)))
