"""Rewards: groups of completions -> one number per completion and reward -> their weighted sum [P, G].

P prompts · G completions per prompt.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import numbers
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpo.errors import ConfigError, RewardError
from grpo.rewards import countdown, feedback, math_answers, math_verified, prose, text_match, xml_format  # noqa: F401  (importing them registers their rewards)
from grpo.rewards.registry import REWARDS, RewardFunction, register_reward, text_of
from grpo.types import Group

if TYPE_CHECKING:  # torch is imported where it is used: reward workers import this package, and should start at once
    from torch import Tensor

__all__ = ["REWARDS", "Failure", "RewardFunction", "RewardSum", "Scores", "call_reward", "register_reward", "text_of"]

ALWAYS_THERE = ("prompts", "completions", "completion_ids")
"""What every reward can ask for. Everything else that it names is a column of the data."""
MAX_REWARD = 1e6
"""A reward beyond this is a mistake (a loss, a length, a time stamp), and would drown every other reward."""


@dataclass(frozen=True)
class Failure:
    """A completion that a reward could not judge."""

    reward: str
    index: int
    """Which of the P * G completions."""
    reason: str
    """"raised ValueError('...')", "gave no value within 2.0 s"."""
    timed_out: bool = False


@dataclass(frozen=True)
class Scores:
    """What a step's completions earned."""

    rewards_PG: Tensor
    """float64 [P, G]: the weighted sum over the rewards that apply. NaN where none applies."""
    by_name: dict[str, Tensor]
    """Each reward by itself, unweighted, float64 [P, G]. NaN where it returned None or failed."""
    failures: list[Failure] = field(default_factory=list)
    """What could not be judged, and why. Such a completion has a total of NaN: it is left out of its group's mean and
    standard deviation, and its advantage is 0."""


class RewardSum:
    """The weighted sum of a run's rewards. A reward of weight 0 is scored and logged, and adds nothing."""

    def __init__(self, weights: dict[str, float]):
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ConfigError(f"rewards: the weight of '{name}' is {weight}, it must be a finite number")
        self.weights = dict(weights)
        self.functions: dict[str, RewardFunction] = {name: REWARDS.get(name) for name in weights}
        for name, function in self.functions.items():
            needs = getattr(function, "needs", None)
            if needs is not None and importlib.util.find_spec(needs) is None:
                library = needs.replace("_", "-")
                raise ConfigError(f"reward '{name}' needs {library}, which is not installed: pip install {library}")

    def check_columns(self, columns: set[str]) -> None:
        """Raises ConfigError if a reward cannot be called with these columns of the data."""
        for name, function in self.functions.items():
            for parameter in inspect.signature(function).parameters.values():
                if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    continue
                if parameter.name in ALWAYS_THERE or parameter.name in columns:
                    continue
                if parameter.default is parameter.empty:
                    there = ", ".join(sorted(columns)) or "none"
                    raise ConfigError(
                        f"reward '{name}' needs the column '{parameter.name}', which the data does not have "
                        f"(columns there: {there}): choose another reward, or add the column to every row"
                    )

    def __call__(self, groups: list[Group]) -> Scores:
        """Scores every completion with every reward, in this process."""
        values = {name: call_reward(name, function, groups) for name, function in self.functions.items()}
        return self.combine(values, groups)

    def start(self) -> None:
        """Nothing to prepare here; see RewardRunner."""

    def offer(self, group: Group) -> None:
        """A group that is finished while others are still being sampled. Nothing to do here; see RewardRunner."""

    def submit(self, groups: list[Group]) -> None:
        """Begin to score; `collect` gives the Scores. In between there is time for something else."""
        self._scores = self(groups)

    def collect(self) -> Scores:
        """The Scores of what was submitted last."""
        return self._scores

    def close(self) -> None:
        """Nothing to end here; see RewardRunner."""

    def combine(
        self, values: dict[str, list[float | None]], groups: list[Group], failures: list[Failure] | None = None
    ) -> Scores:
        """One flat list of P * G values per reward -> Scores. Apart from __call__, so that values may come from
        elsewhere (worker processes), with what failed there.

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
                continue  # Watched only: it must not turn "no reward applies" into a reward of 0.
            total_PG = total_PG + weight * by_name[name].nan_to_num(nan=0.0)
            applied_PG = applied_PG | ~by_name[name].isnan()
        total_PG = total_PG.masked_fill(~applied_PG, math.nan)
        for failure in failures or []:
            if self.weights[failure.reward] != 0 and by_name[failure.reward].flatten()[failure.index].isnan():
                # Without this part the sum would be lower by an amount that nobody knows: a silent 0.
                total_PG.view(-1)[failure.index] = math.nan
        return Scores(total_PG, by_name, failures or [])


def call_reward(name: str, function: RewardFunction, groups: list[Group]) -> list[float | None]:
    """Calls one reward on P groups of G completions -> P * G numbers (or None), every one checked.

    Raises RewardError, with the reward, the place and the completion, for anything else: a broken reward that
    counted as 0 would train the model on noise without a word.
    """
    arguments = arguments_for(function, groups)
    texts = [completion.text for group in groups for completion in group.completions]
    try:
        values = function(**arguments)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # BaseException: some timeouts (math_verify's) are not Exceptions.
        place = _first_that_raises(function, arguments, texts)
        raise RewardError(f"reward '{name}' raised {error!r} on {place}") from error
    values = values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"reward '{name}' returned a {type(values).__name__}, it must return a list with one number (or None) "
            f"for each of the {len(texts)} completions, the first of which is {excerpt(texts, 0)}"
        )
    if len(values) != len(texts):
        raise RewardError(
            f"reward '{name}' returned {len(values)} values for {len(texts)} completions: it must return one number "
            f"(or None) each; the first without a partner is number {min(len(values), len(texts))}, "
            f"{excerpt(texts, min(len(values), len(texts) - 1))}"
        )
    return [_checked(name, value, index, texts) for index, value in enumerate(values)]


def arguments_for(function: RewardFunction, groups: list[Group]) -> dict[str, list[Any]]:
    """P groups -> flat lists of P * G entries, of which the function gets those that it names (all with **kwargs)."""
    pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
    columns = dict.fromkeys(column for group in groups for column in group.prompt.columns)  # a set, in order
    arguments: dict[str, list[Any]] = {
        column: [prompt.columns.get(column) for prompt, _ in pairs] for column in columns
    }
    arguments["prompts"] = [prompt.messages for prompt, _ in pairs]
    arguments["completions"] = [
        completion.text if isinstance(prompt.messages, str) else [{"role": "assistant", "content": completion.text}]
        for prompt, completion in pairs
    ]
    arguments["completion_ids"] = [completion.token_ids for _, completion in pairs]
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {key: value for key, value in arguments.items() if key in parameters}


def _checked(name: str, value: Any, index: int, texts: list[str]) -> float | None:
    number = number_or_fault(value)
    if isinstance(number, str):
        what, _, rule = number.partition(": ")
        raise RewardError(f"reward '{name}' {what} for completion number {index}, {excerpt(texts, index)}: {rule}")
    return number


def number_or_fault(value: Any) -> float | None | str:
    """One value as a reward returned it -> a number, None (does not apply), or what is wrong with it."""
    if value is None:
        return None
    if getattr(value, "ndim", None) == 0:  # one number in a tensor or an array
        value = value.item()
    if not isinstance(value, numbers.Real):
        shown = repr(str(value)[:80])
        return f"returned a {type(value).__name__} ({shown}): it must return a number, or None where it does not apply"
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return f"returned {number}: it must be finite (None = does not apply)"
    if abs(number) > MAX_REWARD:
        return f"returned {number}: more than {MAX_REWARD:g} in size drowns every other reward"
    return number


def _first_that_raises(function: RewardFunction, arguments: dict[str, list[Any]], texts: list[str]) -> str:
    """Calls the failed function again, one completion at a time: the traceback does not say which one it was."""
    for index in range(len(texts)):
        try:
            function(**{key: [value[index]] for key, value in arguments.items()})
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            return f"completion number {index}, {excerpt(texts, index)}"
    return f"the {len(texts)} completions together (each alone passes), the first of which is {excerpt(texts, 0)}"


def excerpt(texts: list[str], index: int) -> str:
    if not texts:
        return "(no completions)"
    text = texts[index]
    return repr(text if len(text) <= 120 else text[:120] + "...")
