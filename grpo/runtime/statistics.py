"""Statistics of right and wrong answers: confidence intervals, a paired test, pass@k. Plain numbers only."""

import math

Z95 = 1.959963984540054
"""The normal quantile that leaves 2.5 % above it."""


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927).

    Unlike p +- 1.96 s it stays in [0, 1], and is not empty at 0 or 1.

    # 0 of 10 -> (0, 0.278);  5 of 10 -> (0.237, 0.763)
    """
    if not count:
        return 0.0, 1.0
    p, z2 = right / count, Z95**2 / count
    middle = (p + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * math.sqrt(p * (1 - p) / count + z2 / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean of independent values, by its standard error; infinite for one value."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return -math.inf, math.inf
    half = Z95 * math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return mean - half, mean + half


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value (McNemar 1947) of two equally good models.

    Args:
        only_first: Items that only the first model answered right.
        only_second: Items that only the second model answered right.

    # 1 and 9: 2 * (C(10, 0) + C(10, 1)) / 2^10 = 22 / 1024 = 0.0215
    """
    count = only_first + only_second
    tail = sum(math.comb(count, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**count)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Return the unbiased estimate that at least one of k samples is right (arXiv 2107.03374, eq. 1).

    # 1 of 4 right: pass@1 = 0.25, pass@2 = 1 - (3/4 * 2/3) = 0.5
    """
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod((samples - correct - i) / (samples - i) for i in range(k))
