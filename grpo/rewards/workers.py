"""Reward worker pool: groups -> worker processes with deadlines -> Scores. No reward can hang or crash the training.

    offer(group)   ---> thread of reward a ---> processes of a    while others are still being sampled
    submit(groups) ---> thread of reward a ---> processes of a    values, or killed at the deadline
                   \\--> thread of reward b ---> processes of b    (a slow reward does not delay another one)
    collect()      <--- values and failures, combined

Only a reward that scores each completion by itself (@one_by_one) begins before all completions are sampled. Any other
one may compare them with each other, and gets all completions of a step together.

A reward that fails on all completions together is called again one by one, to find the ones that it cannot score. Those
are masked (no advantage, left out of their group's mean) and counted, never scored 0 in silence.
"""

import atexit
import contextlib
import dataclasses
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from grpo.errors import RewardError
from grpo.rewards.calls import excerpt
from grpo.rewards.context import Notes, TrainerState
from grpo.rewards.registry import RewardFunction
from grpo.rewards.scoring import Failure, RewardSum, Scores
from grpo.rewards.signature import column_arguments
from grpo.rewards.worker_process import ENDED, Worker
from grpo.runtime.exit import before_forced_exit
from grpo.types import Group

MAX_FAILED_FRACTION = 0.2
"""Fraction of one step's completions. A reward that fails on more is broken: training on the rest would hide it."""
MAX_STEPS_WITHOUT_VALUES = 3
"""Steps in a row in which a reward returns no value in time, after which the run ends."""
MAX_KILLS = 8
"""Kills of one worker per step; completions that it has not scored by then fail. Where completions are scored one by
one only to find the slow ones, each gets the deadline divided by this number."""

Values = list[float | None | Failure]


@dataclasses.dataclass
class Scored:
    """The values of one reward, one per completion, and what it recorded."""

    values: Values
    notes: Notes = dataclasses.field(default_factory=Notes)


class RewardWorkerPool(RewardSum):
    """Weighted sum of a run's rewards, computed in worker processes.

    Args:
        weights: Reward name -> weight.
        deadline: Seconds for one reward and all completions of a step. Finding the completions that failed may take as
            long again.
        on_error: Handling of completions that cannot be scored: "mask", "zero" or "raise".
        workers: Processes for each reward that scores completions one by one.
        kwargs: Reward name -> keyword arguments of its function.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        deadline: float = 60.0,
        on_error: str = "mask",
        workers: int = 2,
        kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        super().__init__(weights, kwargs)
        self.on_error = on_error
        self._rewards = [
            RewardExecutor(name, function, self.kwargs[name], deadline, workers)
            for name, function in self.functions.items()
        ]
        self._offered: dict[int, tuple[Group, dict[str, Future[Scored]]]] = {}
        self._steps_without_values = dict.fromkeys(weights, 0)
        self._pending: tuple[list[Group], list[list[Future[Scored]]]] | None = None
        _POOLS.add(self)

    def start(self) -> None:
        """Start the processes in the background, while models are being loaded."""
        for reward in self._rewards:
            reward.thread.submit(reward.start)

    def __call__(self, groups: list[Group]) -> Scores:
        """Score every completion with every reward."""
        self.submit(groups)
        return self.collect()

    def offer(self, group: Group) -> None:
        """Begin to score a group with the rewards that score completions one by one. `submit` must name it again."""
        futures = {
            reward.name: self._submit_to(reward, [group]) for reward in self._rewards if reward.seconds_each is not None
        }
        self._offered[group.prompt.draw] = group, futures

    def submit(self, groups: list[Group]) -> None:
        """Begin to score what has not been offered, and return at once."""
        assert self._pending is None, "collect the scores of the groups before"
        early = [self._offered[g.prompt.draw] for g in groups if self._offered.get(g.prompt.draw, (None,))[0] is g]
        futures = []
        for reward in self._rewards:
            if len(early) == len(groups) and reward.seconds_each is not None:
                futures.append([offered[reward.name] for _, offered in early])
            else:
                futures.append([self._submit_to(reward, groups)])
        for group in groups:
            if self._offered.get(group.prompt.draw, (None,))[0] is group:  # a held-out prompt may have the same number
                del self._offered[group.prompt.draw]
        self._pending = groups, futures

    def collect(self) -> Scores:
        """Wait for the Scores of the submitted groups.

        Raises:
            RewardError: A reward fails too often, or at all with on_error "raise".
        """
        assert self._pending is not None, "submit comes first"
        (groups, futures), self._pending = self._pending, None
        texts = [completion.text for group in groups for completion in group.completions]
        values: dict[str, list[float | None]] = {}
        failures: list[Failure] = []
        notes = Notes()
        for reward, parts in zip(self._rewards, futures, strict=True):
            scored, recorded = concatenate([part.result() for part in parts])
            notes.add(recorded)
            reward.seconds_used = 0.0
            failed = [value for value in scored if isinstance(value, Failure)]
            self._check(reward.name, failed, texts)
            failures += failed
            replacement = 0.0 if self.on_error == "zero" else None
            values[reward.name] = [replacement if isinstance(value, Failure) else value for value in scored]
        return self.combine(values, groups, failures, notes)

    def close(self) -> None:
        """End every process. Idempotent."""
        for reward in self._rewards:
            reward.kill()
            reward.thread.shutdown(wait=False, cancel_futures=True)

    def _submit_to(self, reward: "RewardExecutor", groups: list[Group]) -> Future[Scored]:
        count = sum(len(group.completions) for group in groups)
        arguments = column_arguments(reward.function, groups, reward.kwargs)
        return reward.thread.submit(reward.score, arguments, count, self.state)

    def _check(self, name: str, failed: list[Failure], texts: list[str]) -> None:
        """Raise RewardError if a reward failed too often. Timeouts can be due to completions, others are bugs."""
        broken = [failure for failure in failed if not failure.timed_out]
        late = len(failed) - len(broken)
        if failed and self.on_error == "raise":
            raise RewardError(f"reward '{name}' {_with_completion(failed[0], texts)}")
        if len(broken) > max(1, MAX_FAILED_FRACTION * len(texts)):
            examples = "; ".join(_with_completion(failure, texts) for failure in broken[:3])
            raise RewardError(
                f"reward '{name}' failed on {len(broken)} of {len(texts)} completions: {examples}. "
                f"Fix the function; `python launch/check.py` runs it on examples"
            )
        silent = bool(texts) and late == len(texts)
        self._steps_without_values[name] = self._steps_without_values[name] + 1 if silent else 0
        if self._steps_without_values[name] >= MAX_STEPS_WITHOUT_VALUES:
            raise RewardError(
                f"reward '{name}' scored none of the completions of {MAX_STEPS_WITHOUT_VALUES} steps in time, the "
                f"first of which {_with_completion(failed[0], texts)}. Make it faster, or raise scoring.deadline"
            )


class RewardExecutor:
    """One reward: its worker processes, and the thread that waits for them."""

    def __init__(self, name: str, function: RewardFunction, kwargs: dict[str, Any], deadline: float, workers: int):
        self.name, self.function, self.kwargs, self.deadline = name, function, kwargs, deadline
        self.seconds_each: float | None = getattr(function, "seconds_each", None)
        """Deadline for one completion, for rewards that score completions one by one."""
        self.workers = [Worker(name, function, kwargs) for _ in range(max(1, workers))]
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"reward {name}")
        self._state, self._notes, self._recording = TrainerState(), Notes(), threading.Lock()
        self.seconds_used = 0.0
        """Part of `deadline` that this step's completions have taken so far, where they are scored group by group."""

    def start(self) -> None:
        """Start the processes that the next request needs."""
        for worker in self.workers if self.seconds_each else self.workers[:1]:
            with contextlib.suppress(RewardError):  # raised again by the first request
                worker.start()

    def kill(self) -> None:
        """Kill all processes."""
        for worker in self.workers:
            worker.kill()

    def score(self, arguments: dict[str, list[Any]], count: int, state: TrainerState | None = None) -> Scored:
        """Return one value or Failure for each of the `count` completions, and what the reward recorded."""
        self._state, self._notes = state or TrainerState(), Notes()
        return Scored(self._score(arguments, count), self._notes)

    def _score(self, arguments: dict[str, list[Any]], count: int) -> Values:
        everyone = list(range(count))
        if count == 0:
            return []
        if self.seconds_each is not None:
            return self._one_by_one(arguments, everyone, min(self.seconds_each, self.deadline))
        answer = self._together(arguments, everyone)
        if isinstance(answer, list):
            return answer
        if answer.reason.startswith("returned"):  # the wrong number of values: no completion is to blame
            return [Failure(self.name, index, answer.reason) for index in everyone]
        return self._find_failures(arguments, everyone, answer)

    def _find_failures(self, arguments: dict[str, list[Any]], everyone: list[int], failure: Failure) -> Values:
        """Score the completions one by one after the call on all of them has failed, and keep the failures.

        The others are scored together again: a reward may compare completions, so values of a completion alone do not
        count.
        """
        alone = self._one_by_one(arguments, everyone, self.deadline / MAX_KILLS)
        good = [index for index in everyone if not isinstance(alone[index], Failure)]
        if failure.timed_out or not good:
            return alone
        self._notes = Notes()  # those of the calls with one completion each do not count either
        died = failure.reason.startswith(ENDED)  # killed from outside, perhaps: not by these completions
        again: Failure | Values = failure
        if died or len(good) < len(everyone):
            again = self._together(arguments, good)
        if isinstance(again, Failure):
            return [Failure(self.name, index, again.reason, again.timed_out) for index in everyone]
        for index, value in zip(good, again, strict=True):
            alone[index] = value
        return alone

    def _together(self, arguments: dict[str, list[Any]], indices: list[int]) -> Values | Failure:
        """Score these completions with one call."""
        worker = self.workers[0]
        answer = self._request(worker, arguments, indices, self.deadline)
        if answer is None:
            return Failure(self.name, indices[0], f"gave no value within {self.deadline:g} s", timed_out=True)
        if isinstance(answer, str):
            return Failure(self.name, indices[0], answer)
        return [self._value(index, value) for index, value in zip(indices, answer, strict=True)]

    def _one_by_one(self, arguments: dict[str, list[Any]], indices: list[int], seconds: float) -> Values:
        """Score each completion with one call of at most `seconds`, all within the step's deadline, on all workers."""
        begun = time.monotonic()
        ends = begun + self.deadline - self.seconds_used
        shares = [indices[number :: len(self.workers)] for number in range(len(self.workers))]
        results: dict[int, float | None | Failure] = {}
        with ThreadPoolExecutor(len(shares)) as threads:
            for found in threads.map(
                lambda worker, share: dict(self._score_share(worker, arguments, share, seconds, ends)),
                self.workers,
                shares,
            ):
                results |= found
        if self.seconds_each is not None:
            self.seconds_used += time.monotonic() - begun
        return [results[index] for index in indices]

    def _score_share(
        self, worker: Worker, arguments: dict[str, list[Any]], indices: list[int], seconds: float, ends: float
    ) -> Iterator[tuple[int, float | None | Failure]]:
        """Score one worker's share of the completions, until the time `ends`."""
        kills = 0
        for index in indices:
            left = min(seconds, ends - time.monotonic())
            if left <= 0 or kills >= MAX_KILLS:
                yield index, Failure(self.name, index, "was not scored: the step's time was used up", timed_out=True)
                continue
            answer = self._request(worker, arguments, [index], left)
            if answer is None:
                kills += 1
                yield index, Failure(self.name, index, f"gave no value within {left:.2g} s", timed_out=True)
            elif isinstance(answer, str):
                yield index, Failure(self.name, index, answer)
            else:
                yield index, self._value(index, answer[0])

    def _request(
        self, worker: Worker, arguments: dict[str, list[Any]], indices: list[int], seconds: float
    ) -> list[float | None | str] | str | None:
        """Ask a worker. Returns the values, one error text for all, or None after the deadline, when it is killed."""
        try:
            chosen = {key: [column[i] for i in indices] for key, column in arguments.items()}
            worker.send(chosen, self._state, seconds)
            received = worker.receive(seconds)
        except (EOFError, OSError):
            return worker.exit_reason()
        if received is None:
            worker.kill()
            return None
        answer, notes = received
        if not isinstance(answer, str):
            with self._recording:
                self._notes.add(notes, indices)
        return answer

    def _value(self, index: int, value: float | None | str) -> float | None | Failure:
        return Failure(self.name, index, value) if isinstance(value, str) else value


def concatenate(parts: list[Scored]) -> tuple[Values, Notes]:
    """Join the values and notes of several groups; failures get their index among all completions."""
    values: Values = []
    notes = Notes()
    for part in parts:
        start = len(values)
        values += [
            dataclasses.replace(value, index=start + value.index) if isinstance(value, Failure) else value
            for value in part.values
        ]
        notes.add(part.notes, start=start)
    return values, notes


def _with_completion(failure: Failure, texts: list[str]) -> str:
    return f"{failure.reason} on completion number {failure.index}, {excerpt(texts, failure.index)}"


_POOLS: "weakref.WeakSet[RewardWorkerPool]" = weakref.WeakSet()


def close_all() -> None:
    """End every worker of this process, at exit (multiprocessing would wait for them) and before a forced exit."""
    for pool in list(_POOLS):
        pool.close()


atexit.register(close_all)
before_forced_exit(close_all)
