"""Intervals of a forecast: a few observed groups and steps -> 90 % intervals for the next ones. Numbers only.

n groups observed · P groups in a step · G completions per group · V different rewards.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Z90 = 1.6448536269514722
"""The normal quantile that leaves 5 % above it."""
DRIFT, WALK = 0.2, 0.1
"""Steady and irregular change of a mean per step of training that are expected beforehand, in standard deviations
between groups."""
NOISE, NOISE_STEPS = 0.1, 2
"""Relative variation of the seconds of a step that is expected beforehand, and the observed steps that it counts as."""
SHARED_CPU, OWN_DEVICE = 0.3, 0.05
"""Relative change of the speed of the machine after the probe that is allowed for: other programs share a CPU."""
MAX_VALUES = 8
"""Different rewards that are told apart. Rarer ones are taken to differ from each other."""
LARGEST_SIZE = 1024
"""The largest group size that is tried."""


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 90 % interval."""

    value: float
    low: float
    high: float


class Trend:
    """A mean that may move from step to step: least squares for a + b (step - 1), with a prior for the slope b.

    Bayesian linear regression with known prior ratio (Gelman et al., Bayesian Data Analysis, 3rd edition, section
    14.8): b ~ N(0, (DRIFT s)^2), where s is the standard deviation between groups. With one step, b is the prior.
    What is not linear adds the variance (WALK s)^2 for each step from the first.

    Args:
        steps: [n] step of each observation, from 1.
        values: [n] observations, of one group each.
    """

    def __init__(self, steps: Sequence[float], values: Sequence[float]) -> None:
        x = torch.tensor([[1.0, step - 1.0] for step in steps], dtype=torch.float64)
        y = torch.tensor(values, dtype=torch.float64)
        precision = x.T @ x + torch.diag(torch.tensor([0.0, 1 / DRIFT**2], dtype=torch.float64))
        self._covariance = torch.linalg.inv(precision)
        self._weights = self._covariance @ (x.T @ y)
        self._freedom = max(1, len(values) - 1)
        self._spread = math.sqrt(float(((y - x @ self._weights) ** 2).sum()) / self._freedom)

    def at(self, step: float) -> tuple[float, float]:
        """Return the mean at a step, and its variance in units of the variance between groups: 1 / n without drift."""
        x = torch.tensor([1.0, step - 1.0], dtype=torch.float64)
        return float(x @ self._weights), float(x @ self._covariance @ x) + WALK**2 * (step - 1)

    def mean(self, step: float, groups: float = math.inf, bounds: tuple[float, float] = (0, math.inf)) -> Interval:
        """Return the interval of the mean over `groups` new groups of a step; of the expectation for infinitely many.

        mean +- t s sqrt(1 / groups + variance of the mean), with Student's t at n - 1 degrees of freedom.
        """
        mean, variance = self.at(step)
        half = student_t(self._freedom) * self._spread * math.sqrt(1 / groups + variance)
        return Interval(*(min(max(end, bounds[0]), bounds[1]) for end in (mean, mean - half, mean + half)))

    def share(self, step: float, groups: int) -> Interval:
        """Return the interval of the share of a step's `groups` that are 1, where all observations are 0 or 1.

        The share's probability is Beta(p / v + 1/2, (1 - p) / v + 1/2) with the mean p of the trend and its relative
        variance v (1 / n without drift: Jeffreys' posterior). So the number is beta-binomial.
        """
        p, variance = self.at(step)
        p = min(max(p, 0.0), 1.0)
        a, b = p / variance + 0.5, (1 - p) / variance + 0.5
        chances = [math.exp(log_beta_binomial(k, groups, a, b)) for k in range(groups + 1)]
        low, high = quantiles(chances)
        return Interval(a / (a + b), low / groups, high / groups)


def log_beta_binomial(k: int, n: int, a: float, b: float) -> float:
    """log C(n, k) B(k + a, n - k + b) / B(a, b)."""
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways + log_beta(k + a, n - k + b) - log_beta(a, b)


def log_beta(a: float, b: float) -> float:
    """log B(a, b) = log Gamma(a) Gamma(b) / Gamma(a + b)."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def quantiles(chances: Sequence[float]) -> tuple[int, int]:
    """Return the smallest k with a cumulative chance above 5 %, and the smallest with at least 95 %."""
    total, low, high = 0.0, 0, 0
    for k, chance in enumerate(chances):
        before, total = total, total + chance
        low = k if before <= 0.05 < total else low
        high = k if before < 0.95 <= total else high
    return low, high if total >= 0.95 else len(chances) - 1


def proportion(hits: float, count: float) -> Interval:
    """Return a proportion with Jeffreys' interval: the quantiles of Beta(hits + 1/2, count - hits + 1/2).

    # 0 of 10: [0.000, 0.124];  5 of 10: [0.262, 0.738]. At 0 and 1 the interval begins and ends there.
    """
    a, b = hits + 0.5, count - hits + 0.5
    x = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    density = torch.exp((a - 1) * x.log() + (b - 1) * torch.log1p(-x) - log_beta(a, b))
    total = density.cumsum(0) / density.sum()
    tail = 0.1 if hits in (0, count) else 0.05
    low = 0.0 if hits == 0 else float(x[torch.searchsorted(total, tail)])
    high = 1.0 if hits == count else float(x[min(len(x) - 1, int(torch.searchsorted(total, 1 - tail)))])
    return Interval(hits / count, low, high)


def student_t(freedom: int) -> float:
    """Return the 95 % quantile of Student's t: exact for one and two degrees of freedom, else within 0.1 %.

    The expansion in 1 / freedom is that of Abramowitz and Stegun, 26.7.5.
    """
    if freedom <= 2:
        return 6.313751514675043 if freedom == 1 else 2.919985580353726
    z, n = Z90, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, start=1))


def next_seconds(seconds: Sequence[float], steps: float = 1, machine: float = SHARED_CPU) -> Interval:
    """Return the interval of the mean seconds of `steps` more steps, from those of the observed ones.

    Their logarithms vary with a standard deviation s around a mean m: exp(m +- t sqrt(s^2 / n + s^2 / steps + b^2)).
    s^2 is that of the n observed steps and of the prior: NOISE^2, which counts as NOISE_STEPS more. b is `machine`.
    The mean of many seconds is above the exponential of their mean logarithm: by exp(s^2 / 2), with s^2 of the steps.
    """
    logs = [math.log(max(value, 1e-9)) for value in seconds]
    n, mean = len(logs), sum(logs) / len(logs)
    freedom = NOISE_STEPS + n - 1
    variance = (NOISE_STEPS * NOISE**2 + sum((value - mean) ** 2 for value in logs)) / freedom
    mean += variance / 2 * (1 - 1 / steps)
    half = student_t(freedom) * math.sqrt(variance * (1 / n + 1 / steps) + machine**2)
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def count_values(groups: Sequence[Sequence[float]]) -> Tensor:
    """Return how often each reward occurs in each group: [n, V + 1], the commonest first, all rarer ones last.

    # [1, 1, 0], [0, 0, 0]  ->  values 0, 1:  [[1, 2, 0], [3, 0, 0]]
    """
    rounded = [[round(reward, 9) for reward in group if reward == reward] for group in groups]
    common = [value for value, _ in Counter(value for group in rounded for value in group).most_common(MAX_VALUES)]
    rows = [[group.count(value) for value in common] for group in rounded]
    rest = [len(group) - sum(row) for group, row in zip(rounded, rows, strict=True)]
    return torch.tensor([[*row, other] for row, other in zip(rows, rest, strict=True)], dtype=torch.float64)


def fit_dirichlet(counts_UV: Tensor, weights_BU: Tensor, iterations: int = 200) -> Tensor:
    """Return the Dirichlet's parameters [B, V] under which the counts of multinomial groups are likeliest.

    Minka 2000, Estimating a Dirichlet distribution, eq. 65. With two values: the beta-binomial distribution.

    Args:
        counts_UV: The U different rows of counts.
        weights_BU: Number of groups with each row, in each of B samples.
        iterations: Of the fixed point.
    """
    totals_U = counts_UV.sum(1)
    shares_BV = weights_BU @ counts_UV / (weights_BU @ totals_U)[:, None]
    alpha_BV = shares_BV.clamp(min=1e-6)
    for _ in range(iterations):
        sum_B1 = alpha_BV.sum(1, keepdim=True)
        above_BUV = torch.digamma(counts_UV + alpha_BV[:, None]) - torch.digamma(alpha_BV)[:, None]
        below_BU = torch.digamma(totals_U + sum_B1) - torch.digamma(sum_B1)
        above_BV, below_B1 = (weights_BU[:, None] @ above_BUV)[:, 0], (weights_BU * below_BU).sum(1, keepdim=True)
        alpha_BV = (alpha_BV * above_BV / below_B1.clamp(min=1e-12)).clamp(1e-6, 1e6)
    return alpha_BV


def flat_chance(alpha_BV: Tensor, sizes_K: Tensor) -> Tensor:
    """Return the chance [B, K] that all completions of a group earn the same, for each group size.

    sum over v of B(alpha_v + G, A - alpha_v) / B(alpha_v, A - alpha_v), with A the sum of all alpha; the last column
    holds rewards that differ from each other. For two values: E[p^G + (1 - p)^G] with p ~ Beta(alpha).
    """
    alpha_BV1, sum_B11 = alpha_BV[:, :-1, None], alpha_BV.sum(1)[:, None, None]
    logs = torch.lgamma(sum_B11) - torch.lgamma(sum_B11 + sizes_K)
    logs = logs + torch.lgamma(alpha_BV1 + sizes_K) - torch.lgamma(alpha_BV1)
    return logs.exp().sum(1).clamp(max=1.0)


@dataclass(frozen=True)
class FlatBySize:
    """Expected share of flat groups by group size."""

    shares: dict[int, Interval]
    smallest: Interval | None
    """Smallest size whose share is below the wanted one. None: even LARGEST_SIZE is too small, or nothing varied."""


def flat_by_size(
    groups: Sequence[Sequence[float]], wanted: float, shown: Sequence[int], resamples: int = 100
) -> FlatBySize:
    """Fit the rewards of the groups, and extrapolate to other group sizes. The interval is a bootstrap over groups.

    Args:
        groups: Rewards of each group.
        wanted: The share of flat groups to stay below.
        shown: Sizes in the result.
        resamples: Bootstrap samples.
    """
    counts = count_values([group for group in groups if len(group) > 1])
    if not len(counts) or int((counts[:, :-1] > 0).any(0).sum()) + int(counts[:, -1].sum() > 0) < 2:
        return FlatBySize({}, None)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(counts), (resamples, len(counts)), generator=generator)
    rows_UV, row_n, times_U = counts.unique(dim=0, return_inverse=True, return_counts=True)
    drawn_BU = torch.stack([row_n[pick].bincount(minlength=len(rows_UV)) for pick in picks])
    alpha = fit_dirichlet(rows_UV, torch.cat([times_U[None], drawn_BU]).double())
    sizes = torch.arange(2, LARGEST_SIZE + 1, dtype=torch.float64)
    chance = flat_chance(alpha, sizes)
    ends = chance[1:].sort(0).values[[int(0.05 * resamples), int(0.95 * resamples) - 1]]
    shares = {size: Interval(*(float(row[size - 2]) for row in (chance[0], *ends))) for size in shown}
    below = chance < wanted
    first = torch.where(below.any(1), below.double().argmax(1) + 2, LARGEST_SIZE + 1).tolist()
    if first[0] > LARGEST_SIZE:
        return FlatBySize(shares, None)
    ordered = sorted(first[1:])
    low, high = ordered[int(0.05 * resamples)], ordered[int(0.95 * resamples) - 1]
    return FlatBySize(shares, Interval(first[0], min(low, first[0]), max(high, first[0])))
