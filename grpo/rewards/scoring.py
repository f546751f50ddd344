"""Rewards: groups of completions -> one number per completion and reward -> their weighted sum [P, G].

P prompts · G completions per prompt.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpo.errors import ConfigError
from grpo.rewards.calls import call_reward
from grpo.rewards.context import Notes, TrainerState
from grpo.rewards.registry import REWARDS, RewardFunction
from grpo.rewards.signature import check_columns, check_kwargs
from grpo.rewards.sources import reward_sources
from grpo.types import Group

if TYPE_CHECKING:  # torch is imported where it is used: `grpo.rewards` must import fast
    from torch import Tensor


@dataclass(frozen=True)
class Failure:
    """A completion that a reward could not score."""

    reward: str
    index: int
    """Index among the P * G completions."""
    reason: str
    """"raised ValueError('...')", "gave no value within 2.0 s"."""
    timed_out: bool = False


@dataclass(frozen=True)
class Scores:
    """Rewards of one step's completions."""

    rewards_PG: Tensor
    """float64 [P, G]: weighted sum of the rewards that apply. NaN where none applies."""
    by_name: dict[str, Tensor]
    """Each reward, unweighted, float64 [P, G]. NaN where it returned None or failed."""
    failures: list[Failure] = field(default_factory=list)
    """Completions that could not be scored. Their total is NaN: they are left out of the mean and standard deviation of
    their group, and their advantage is 0."""
    notes: Notes = field(default_factory=Notes)
    """What the rewards have recorded, by index among the P * G completions."""


class RewardSum:
    """Weighted sum of a run's rewards, computed in this process.

    Args:
        weights: Reward name -> weight. A reward of weight 0 is computed and logged, and adds nothing.
        kwargs: Reward name -> keyword arguments of its function.

    Raises:
        ConfigError: A name is unknown, a weight is not finite, a library is missing, or a keyword argument does not fit
            the function's signature.
    """

    def __init__(self, weights: Mapping[str, float], kwargs: Mapping[str, Mapping[str, Any]] | None = None):
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ConfigError(f"rewards: the weight of '{name}' is {weight}, it must be a finite number")
        self.weights = dict(weights)
        self.state = TrainerState()
        """The state of the run that rewards are given; set by the trainer before each step."""
        self.functions: dict[str, RewardFunction] = {name: REWARDS.get(name) for name in weights}
        self.sources = reward_sources(self.functions)
        """The files as they were loaded: editing one during the run does not change this run."""
        for name, function in self.functions.items():
            needs = getattr(function, "needs", None)
            if needs is not None and importlib.util.find_spec(needs) is None:
                library = needs.replace("_", "-")
                raise ConfigError(f"reward '{name}' needs {library}, which is not installed: pip install {library}")
        for name in kwargs or {}:
            if name not in weights:
                raise ConfigError(f"reward_kwargs has '{name}', it must be one of the rewards: {', '.join(weights)}")
        self.kwargs: dict[str, dict[str, Any]] = {name: dict((kwargs or {}).get(name) or {}) for name in weights}
        for name, function in self.functions.items():
            check_kwargs(name, function, self.kwargs[name])

    def check_columns(self, columns: set[str]) -> None:
        """Raise ConfigError if a reward cannot be called with these columns of the data."""
        for name, function in self.functions.items():
            check_columns(name, function, self.kwargs[name], columns)

    def __call__(self, groups: list[Group]) -> Scores:
        """Score every completion with every reward."""
        values, notes = {}, Notes()
        for name, function in self.functions.items():
            found = Notes()
            values[name] = call_reward(name, function, groups, self.kwargs[name], state=self.state, notes=found)
            notes.add(found)
        return self.combine(values, groups, notes=notes)

    def start(self) -> None:
        """Do nothing: only RewardWorkerPool has processes to start."""

    def offer(self, group: Group) -> None:
        """Do nothing: only RewardWorkerPool can score a group while others are still being sampled."""

    def submit(self, groups: list[Group]) -> None:
        """Begin to score; `collect` returns the Scores."""
        self._scores = self(groups)

    def collect(self) -> Scores:
        """Return the Scores of the groups that were submitted last."""
        return self._scores

    def close(self) -> None:
        """Do nothing: only RewardWorkerPool has processes to end."""

    def combine(
        self,
        values: Mapping[str, list[float | None]],
        groups: list[Group],
        failures: list[Failure] | None = None,
        notes: Notes | None = None,
    ) -> Scores:
        """Return the Scores of one flat list of P * G values per reward, and of the completions that failed.

        weights a 1.0, b 0.5    a [1, 0]    b [None, 2]    ->    rewards_PG [1.0, 0 + 0.5 * 2 = 1.0]
        with b failing on the second                       ->    rewards_PG [1.0, NaN]
        """
        import torch

        shape = (len(groups), len(groups[0].completions) if groups else 0)
        assert all(len(group.completions) == shape[1] for group in groups), "every group has the same G completions"
        by_name: dict[str, Tensor] = {}
        total_PG = torch.zeros(shape, dtype=torch.float64)
        applied_PG = torch.zeros(shape, dtype=torch.bool)
        for name, weight in self.weights.items():
            flat = [math.nan if value is None else value for value in values[name]]
            by_name[name] = torch.tensor(flat, dtype=torch.float64).reshape(shape)
            if weight == 0:
                continue  # logged only: it must not turn "no reward applies" into a reward of 0
            total_PG = total_PG + weight * by_name[name].nan_to_num(nan=0.0)
            applied_PG = applied_PG | ~by_name[name].isnan()
        total_PG = total_PG.masked_fill(~applied_PG, math.nan)
        for failure in failures or []:
            if self.weights[failure.reward] != 0 and by_name[failure.reward].flatten()[failure.index].isnan():
                # Without this term the sum is off by an unknown amount: NaN masks the completion instead.
                total_PG.view(-1)[failure.index] = math.nan
        return Scores(total_PG, by_name, failures or [], notes or Notes())


def concatenate_scores(parts: list[Scores]) -> Scores:
    """Concatenate the scores of several rounds of sampling, without those in which this rank had no prompt."""
    import torch

    real = [part for part in parts if len(part.rewards_PG)] or parts[:1]
    notes, start = Notes(), 0
    for part in real:
        notes.add(part.notes, start=start)
        start += part.rewards_PG.numel()
    return Scores(
        torch.cat([part.rewards_PG for part in real]),
        {name: torch.cat([part.by_name[name] for part in real]) for name in real[0].by_name},
        [failure for part in real for failure in part.failures],
        notes,
    )
