"""One call of one reward function: groups of completions -> one checked number per completion."""

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpo.errors import RewardError
from grpo.rewards.context import Notes, TrainerState, context_arguments
from grpo.rewards.registry import RewardFunction
from grpo.rewards.signature import column_arguments
from grpo.types import Group

MAX_REWARD = 1e6
"""A larger reward is a mistake (a loss, a length, a time stamp) and would drown every other reward."""


def call_reward(
    name: str,
    function: RewardFunction,
    groups: list[Group],
    kwargs: Mapping[str, Any] | None = None,
    *,
    state: TrainerState | None = None,
    notes: Notes | None = None,
) -> list[float | None]:
    """Call one reward on P groups of G completions.

    Args:
        name: The reward's name in error messages.
        kwargs: Keyword arguments from `reward_kwargs`.
        state: The state of the run, for a reward that reads it.
        notes: Collects what the reward records.

    Returns:
        P * G numbers, or None where the reward does not apply.

    Raises:
        RewardError: The function raised, or did not return one number or None per completion. The message names the
            reward, the place and the completion.
    """
    kwargs = dict(kwargs or {})
    kwargs |= context_arguments(function, state or TrainerState(), notes if notes is not None else Notes())
    arguments = column_arguments(function, groups, kwargs)
    texts = [completion.text for group in groups for completion in group.completions]
    try:
        values: Any = finished(function(**arguments, **kwargs))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # BaseException: some timeouts (math_verify's) are not Exceptions.
        place = _first_that_raises(function, arguments, kwargs, texts)
        raise RewardError(f"reward '{name}' raised {error!r} on {place}") from error
    values = as_list(values)
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"reward '{name}' returned a {type(values).__name__}, it must return a list with one number (or None) "
            f"for each of the {len(texts)} completions, the first of which is {excerpt(texts, 0)}"
        )
    if len(values) != len(texts):
        raise RewardError(
            f"reward '{name}' returned {len(values)} values for {len(texts)} completions: it must return one number "
            f"(or None) each; the first mismatch is at number {min(len(values), len(texts))}, "
            f"{excerpt(texts, min(len(values), len(texts) - 1))}"
        )
    return [_checked(name, value, index, texts) for index, value in enumerate(values)]


def finished(values: Any) -> Any:
    """Return the values of a call, after waiting for those of an async function."""
    if not inspect.isawaitable(values):
        return values

    async def wait() -> Any:
        return await values

    with ThreadPoolExecutor(1) as threads:  # a new thread has no event loop (a notebook's has one)
        return threads.submit(asyncio.run, wait()).result()


def values_or_error(
    function: Callable[..., Any], arguments: dict[str, list[Any]], kwargs: Mapping[str, Any]
) -> list[float | None | str] | str:
    """Call a reward without raising, for a worker process.

    Returns:
        One number, None or error text per completion; or one error text for all of them.
    """
    count = len(next(iter(arguments.values()), []))
    try:
        values = as_list(finished(function(**arguments, **kwargs)))
        if not isinstance(values, list | tuple):
            return f"returned a {type(values).__name__}: it must return a list of numbers"
        if len(values) != count:
            return f"returned {len(values)} values for {count} completions: it must return one number (or None) each"
        return [number_or_error(value) for value in values]
    except BaseException as error:  # BaseException: as in call_reward
        return f"raised {error!r:.300}"


def as_list(values: Any) -> Any:
    """Return an array or a tensor as a list, and anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def number_or_error(value: Any) -> float | None | str:
    """Return a reward's value as a float, None (does not apply), or text that says what is wrong with it."""
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


def excerpt(texts: list[str], index: int) -> str:
    """Return the beginning of one completion for an error message."""
    if not texts:
        return "(no completions)"
    text = texts[index]
    return repr(text if len(text) <= 120 else text[:120] + "...")


def _checked(name: str, value: Any, index: int, texts: list[str]) -> float | None:
    number = number_or_error(value)
    if isinstance(number, str):
        problem, _, rule = number.partition(": ")
        raise RewardError(f"reward '{name}' {problem} for completion number {index}, {excerpt(texts, index)}: {rule}")
    return number


def _first_that_raises(
    function: RewardFunction, arguments: dict[str, list[Any]], kwargs: Mapping[str, Any], texts: list[str]
) -> str:
    """Call the failed function again, one completion at a time: the traceback does not name the completion."""
    for index in range(len(texts)):
        try:
            finished(function(**{key: [column[index]] for key, column in arguments.items()}, **kwargs))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            return f"completion number {index}, {excerpt(texts, index)}"
    return f"the {len(texts)} completions together (each alone passes), the first of which is {excerpt(texts, 0)}"
