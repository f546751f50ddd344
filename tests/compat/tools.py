"""Tools and environments of the tests, in a file that a worker process imports without torch."""

from typing import Any


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


class Counter:
    """An environment of TRL: it counts."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.total, self.rows = 0, list[dict]()

    def reset(self, **row: Any) -> str:
        """Begin anew."""
        self.total = 0
        self.rows.append(row)
        return f" from {row['n']}"

    def increase(self, step: int) -> str:
        """Count on.

        Args:
            step: By how much.
        """
        if step == 3:
            raise ValueError("never 3")
        self.total += step
        return str(self.total)

    def get_reward(self) -> float:
        """Return the count."""
        return float(self.total)

    def _hidden(self) -> None: ...
