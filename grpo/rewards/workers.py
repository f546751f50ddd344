"""The reward runner: groups -> worker processes with deadlines -> Scores. No reward can hang, crash or poison training.

    offer(group)   ---> thread of reward a ---> process a     while other groups are still being sampled
    submit(groups) ---> thread of reward a ---> process a     values, or nothing in time: killed
                   \\--> thread of reward b ---> process b     (a slow reward makes no other one wait)
    collect()      <--- values and failures, combined

Only a reward that judges each completion by itself (@one_by_one) is asked before all completions are there: any other one
may compare them with each other, and gets a step's completions together.

A reward that fails on all completions together is asked again one by one, to find out which of them it cannot judge;
those are masked (no advantage, out of their group's mean) and counted, never scored 0 in silence.

Processes, because neither an endless loop in C code nor 9**9**9**9 can be stopped from inside a process.
"""

import atexit
import contextlib
import dataclasses
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from grpo.errors import ConfigError, RewardError
from grpo.rewards.scoring import (
    REWARDS,
    Failure,
    RewardFunction,
    RewardSum,
    Scores,
    arguments_for,
    excerpt,
    number_or_fault,
)
from grpo.runtime.exit import before_forced_exit
from grpo.types import Group

START_SECONDS = 120.0
"""How long a worker may take to start, and to import the file that holds its reward."""
MAX_FAILURES = 0.2
"""Of one step's completions: a reward that fails on more of them is broken, and training on the rest would hide it."""
SILENT_STEPS = 3
"""After so many steps in a row without one value in time, a reward is given up."""
PATIENCE = 8
"""So many times a worker may be killed in one step; what it has not judged by then stays unjudged. When completions are
judged one by one only to find the slow ones, each may take the deadline divided by this."""

Values = list[float | None | Failure]


class RewardRunner(RewardSum):
    """A RewardSum whose functions run in processes of their own.

    deadline: seconds that one reward may take for all completions of a step; finding out which ones are to blame may
    take as long again. on_error: what becomes of a completion that a reward cannot judge: "mask" it, count it as
    "zero", or "raise". workers: processes for each reward that judges completions one by one.
    """

    def __init__(self, weights: dict[str, float], deadline: float = 60.0, on_error: str = "mask", workers: int = 2):
        super().__init__(weights)
        self.on_error = on_error
        self._rewards = [Judge(name, function, deadline, workers) for name, function in self.functions.items()]
        self._offered: dict[int, tuple[Group, dict[str, Future[Values]]]] = {}
        self._silent = dict.fromkeys(weights, 0)
        self._pending: tuple[list[Group], list[list[Future[Values]]]] | None = None
        _RUNNERS.add(self)

    def start(self) -> None:
        """Start the processes now, beside whatever else is being loaded, instead of at the first step."""
        for reward in self._rewards:
            reward.thread.submit(reward.start)

    def __call__(self, groups: list[Group]) -> Scores:
        self.submit(groups)
        return self.collect()

    def offer(self, group: Group) -> None:
        """Let the rewards that judge completions one by one begin with this group, which `submit` will name again."""
        futures = {
            reward.name: self._ask(reward, [group]) for reward in self._rewards if reward.seconds_each is not None
        }
        self._offered[group.prompt.draw] = group, futures

    def submit(self, groups: list[Group]) -> None:
        """Begin to score, unless all of them were offered before; returns at once."""
        assert self._pending is None, "collect the scores of the groups before"
        early = [self._offered[g.prompt.draw] for g in groups if self._offered.get(g.prompt.draw, (None,))[0] is g]
        futures = []
        for reward in self._rewards:
            if len(early) == len(groups) and reward.seconds_each is not None:
                futures.append([asked[reward.name] for _, asked in early])
            else:
                futures.append([self._ask(reward, groups)])
        for group in groups:
            self._offered.pop(group.prompt.draw, None)
        self._pending = groups, futures

    def _ask(self, reward: "Judge", groups: list[Group]) -> Future[Values]:
        count = sum(len(group.completions) for group in groups)
        return reward.thread.submit(reward.judge, arguments_for(reward.function, groups), count)

    def collect(self) -> Scores:
        """The Scores of what was submitted. Raises RewardError for a reward that fails too often."""
        assert self._pending is not None, "submit comes first"
        (groups, futures), self._pending = self._pending, None
        texts = [completion.text for group in groups for completion in group.completions]
        values: dict[str, list[float | None]] = {}
        failures: list[Failure] = []
        for reward, parts in zip(self._rewards, futures, strict=True):
            judged = joined([part.result() for part in parts])
            reward.used = 0.0
            failed = [value for value in judged if isinstance(value, Failure)]
            self._check(reward.name, failed, texts)
            failures += failed
            stand_in = 0.0 if self.on_error == "zero" else None
            values[reward.name] = [stand_in if isinstance(value, Failure) else value for value in judged]
        return self.combine(values, groups, failures)

    def close(self) -> None:
        """End every process. A second call does nothing."""
        for reward in self._rewards:
            reward.kill()
            reward.thread.shutdown(wait=False, cancel_futures=True)

    def _check(self, name: str, failed: list[Failure], texts: list[str]) -> None:
        """Failures are told apart: values that come too late may be the completions' doing, the others are a bug."""
        broken = [failure for failure in failed if not failure.timed_out]
        late = len(failed) - len(broken)
        if failed and self.on_error == "raise":
            raise RewardError(f"reward '{name}' {_place(failed[0], texts)}")
        if len(broken) > max(1, MAX_FAILURES * len(texts)):
            examples = "; ".join(_place(failure, texts) for failure in broken[:3])
            raise RewardError(
                f"reward '{name}' failed on {len(broken)} of {len(texts)} completions: {examples}. "
                f"Mend the function; `python launch/check.py` runs it on examples"
            )
        self._silent[name] = self._silent[name] + 1 if texts and late == len(texts) else 0
        if self._silent[name] >= SILENT_STEPS:
            raise RewardError(
                f"reward '{name}' judged none of the completions of {SILENT_STEPS} steps in time, the first of which "
                f"{_place(failed[0], texts)}. Make it faster, or raise scoring.deadline"
            )


def joined(parts: list[Values]) -> Values:
    """The values of one group after the other -> of all; failures name the completion's place among all."""
    values: Values = []
    for part in parts:
        start = len(values)
        values += [
            dataclasses.replace(value, index=start + value.index) if isinstance(value, Failure) else value
            for value in part
        ]
    return values


class Judge:
    """One reward and its processes, asked by one thread of its own."""

    def __init__(self, name: str, function: RewardFunction, deadline: float, workers: int):
        self.name, self.function, self.deadline = name, function, deadline
        self.seconds_each: float | None = getattr(function, "seconds_each", None)
        self.workers = [Worker(name, function) for _ in range(max(1, workers))]
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"reward {name}")
        self.used = 0.0
        """Seconds of `deadline` that this step's completions have taken so far, where they are judged group by group."""

    def start(self) -> None:
        for worker in self.workers if self.seconds_each else self.workers[:1]:
            with contextlib.suppress(RewardError):  # said when it is needed
                worker.start()

    def kill(self) -> None:
        for worker in self.workers:
            worker.kill()

    def judge(self, arguments: dict[str, list[Any]], count: int) -> Values:
        """One value or Failure for each of the `count` completions."""
        everyone = list(range(count))
        if count == 0:
            return []
        if self.seconds_each is not None:
            return self._one_by_one(arguments, everyone, min(self.seconds_each, self.deadline))
        answer = self._together(arguments, everyone)
        if isinstance(answer, list):
            return answer
        if answer.reason.startswith("returned"):  # the wrong number of values: no completion's fault
            return [Failure(self.name, index, answer.reason) for index in everyone]
        alone = self._one_by_one(arguments, everyone, self.deadline / PATIENCE)
        good = [index for index in everyone if not isinstance(alone[index], Failure)]
        if answer.timed_out or not good:
            return alone
        # A reward may compare completions with each other: only what it says of all of them together counts.
        again: Failure | Values = answer if len(good) == count else self._together(arguments, good)
        if isinstance(again, Failure):
            return [Failure(self.name, index, again.reason, again.timed_out) for index in everyone]
        for index, value in zip(good, again, strict=True):
            alone[index] = value
        return alone

    def _together(self, arguments: dict[str, list[Any]], indices: list[int]) -> Values | Failure:
        worker = self.workers[0]
        try:
            worker.send({key: [column[i] for i in indices] for key, column in arguments.items()}, self.deadline)
            answer = worker.receive(self.deadline)
        except (EOFError, OSError):
            return Failure(self.name, indices[0], worker.exit_reason())
        if answer is None:
            worker.kill()
            return Failure(self.name, indices[0], f"gave no value within {self.deadline:g} s", timed_out=True)
        if isinstance(answer, str):
            return Failure(self.name, indices[0], answer)
        return [self._value(index, value) for index, value in zip(indices, answer, strict=True)]

    def _one_by_one(self, arguments: dict[str, list[Any]], indices: list[int], seconds: float) -> Values:
        """Shared out over the workers, each completion with its own deadline, all of them within the step's."""
        begun = time.monotonic()
        ends = begun + self.deadline - self.used
        shares = [indices[number :: len(self.workers)] for number in range(len(self.workers))]
        results: dict[int, float | None | Failure] = {}
        with ThreadPoolExecutor(len(shares)) as threads:
            for found in threads.map(
                lambda worker, share: dict(self._lane(worker, arguments, share, seconds, ends)), self.workers, shares
            ):
                results |= found
        if self.seconds_each is not None:
            self.used += time.monotonic() - begun
        return [results[index] for index in indices]

    def _lane(
        self, worker: "Worker", arguments: dict[str, list[Any]], indices: list[int], seconds: float, ends: float
    ) -> Iterator[tuple[int, float | None | Failure]]:
        killed = 0
        for index in indices:
            left = min(seconds, ends - time.monotonic())
            if left <= 0 or killed >= PATIENCE:
                yield index, Failure(self.name, index, "was not judged: the step's time was used up", timed_out=True)
                continue
            try:
                worker.send({key: [column[index]] for key, column in arguments.items()}, left)
                answer = worker.receive(left)
            except (EOFError, OSError):
                yield index, Failure(self.name, index, worker.exit_reason())
                continue
            if answer is None:
                killed += 1
                worker.kill()
                yield index, Failure(self.name, index, f"gave no value within {left:.2g} s", timed_out=True)
            elif isinstance(answer, str):
                yield index, Failure(self.name, index, answer)
            else:
                yield index, self._value(index, answer[0])

    def _value(self, index: int, value: float | None | str) -> float | None | Failure:
        return Failure(self.name, index, value) if isinstance(value, str) else value


class Worker:
    """One process that holds one reward: started when it is first needed, killed when it overstays, started again."""

    def __init__(self, name: str, function: RewardFunction):
        self.name, self.function = name, function
        self._process: Any = None
        self._pipe: Connection | None = None

    def start(self) -> None:
        """Returns once the process can be asked. Raises RewardError if it cannot be started."""
        if self._process is not None and self._process.is_alive():
            return
        self.kill()
        address = address_of(self.function)
        # A server process that has imported nothing but this file makes the workers: forking this process itself
        # would copy its threads' locks. Only for a function that no other process can import (a notebook's) it is done.
        context: Any = multiprocessing.get_context("fork" if address is None else _method())
        if address is not None and _method() == "forkserver":
            context.set_forkserver_preload(["grpo.rewards.workers"])
        self._pipe, theirs = multiprocessing.Pipe()
        given = self.function if address is None else address
        self._process = context.Process(target=serve, args=(theirs, given), name=f"reward {self.name}")
        self._process.start()
        theirs.close()
        try:
            ready = self._pipe.poll(START_SECONDS) and self._pipe.recv_bytes() == b"ready"
        except (EOFError, OSError):
            ready = False
        if not ready:
            raise RewardError(f"reward '{self.name}': its process does not start ({self.exit_reason()})")

    def send(self, arguments: dict[str, list[Any]], seconds: float) -> None:
        self.start()
        assert self._pipe is not None
        self._pipe.send((arguments, seconds))

    def receive(self, seconds: float) -> list[float | None | str] | str | None:
        """The values, or what is wrong with all of them, or None if nothing came in time. EOFError: it died."""
        assert self._pipe is not None
        if not self._pipe.poll(seconds):
            return None
        return json.loads(self._pipe.recv_bytes())  # text, not pickle: what comes out of a reward is only read

    def exit_reason(self) -> str:
        """How the process ended, which is then cleared away."""
        process = self._process
        code = None
        if process is not None:
            process.join(1.0)
            code = process.exitcode
        self.kill()
        if code is not None and code < 0:
            return f"ended its process by {signal.Signals(-code).name}"
        return f"ended its process (exit code {code})"

    def kill(self) -> None:
        process, self._process = self._process, None
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            pipe.close()
        if process is None or process.pid is None:  # never started: what stopped it is the error to show
            return
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started; it leads its own group
        process.kill()
        process.join()
        process.close()


def serve(pipe: Connection, given: str | RewardFunction) -> None:
    """The worker's side: arguments in, values out, until the pipe closes."""
    with contextlib.suppress(OSError):
        os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is for the trainer: it saves first, and still needs the rewards
    sys.stdout, sys.stderr = _Forgiving(sys.stdout), _Forgiving(sys.stderr)
    function: Callable[..., Any] = REWARDS.get(given) if isinstance(given, str) else given
    pipe.send_bytes(b"ready")
    # Where a watchdog that exits writes the traceback: nowhere, the trainer says what happened.
    with open(os.devnull, "w") as nowhere:
        while True:
            try:
                arguments, seconds = pipe.recv()
            except (EOFError, OSError):
                return
            # Should the trainer be gone by then, this ends the process even inside C code that never returns.
            faulthandler.dump_traceback_later(seconds + 10, exit=True, file=nowhere)
            answer = _answer(function, arguments)
            faulthandler.cancel_dump_traceback_later()
            try:
                pipe.send_bytes(json.dumps(answer).encode())
            except OSError:
                return


def _answer(function: Callable[..., Any], arguments: dict[str, list[Any]]) -> list[float | None | str] | str:
    count = len(next(iter(arguments.values()), []))
    try:
        values = function(**arguments)
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, list | tuple):
            return f"returned a {type(values).__name__}: it must return a list of numbers"
        if len(values) != count:
            return f"returned {len(values)} values for {count} completions: it must return one number (or None) each"
        return [number_or_fault(value) for value in values]
    except BaseException as error:  # BaseException: some timeouts (math_verify's) are not Exceptions
        return f"raised {error!r:.300}"


def address_of(function: RewardFunction) -> str | None:
    """Where another process finds the function: "package.module:name", "/path/file.py:name"; None = nowhere."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    name = getattr(function, "__qualname__", "")
    if module is None or module.__name__ == "__main__":
        return None
    place = str(module.__file__) if module.__name__.startswith("grpo_file_") else module.__name__
    try:
        return f"{place}:{name}" if REWARDS.get(f"{place}:{name}") is function else None
    except ConfigError:
        return None


def _method() -> str:
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def _place(failure: Failure, texts: list[str]) -> str:
    return f"{failure.reason} on completion number {failure.index}, {excerpt(texts, failure.index)}"


class _Forgiving:
    """Output of a reward that prints: a full disk or a closed terminal is no reason to fail."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_RUNNERS: "weakref.WeakSet[RewardRunner]" = weakref.WeakSet()


def close_all() -> None:
    """End every worker of this process: at exit (multiprocessing would wait for them), and before an immediate one."""
    for runner in list(_RUNNERS):
        runner.close()


atexit.register(close_all)
before_forced_exit(close_all)
