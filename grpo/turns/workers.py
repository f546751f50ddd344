"""Turn workers: tool calls and turns -> worker processes with a deadline -> Steps. A failure is a text for the policy.

    turn with calls   ---> any process   ---> results, errors or timeouts as messages of the role tool
    turn              ---> the process that holds the completion's environment   ---> its messages and reward

A process is killed at the deadline and started again, as those of rewards are (grpo/rewards/worker_process.py).
"""

import atexit
import functools
import itertools
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from grpo.errors import EngineError, RewardError
from grpo.rewards.context import Notes, TrainerState
from grpo.rewards.sources import source_hashes
from grpo.rewards.worker_process import Worker, address_of
from grpo.runtime.exit import before_forced_exit
from grpo.turns import serving
from grpo.turns.calls import Call
from grpo.turns.environment import ENVIRONMENTS, Step
from grpo.turns.tools import TOOLS, Tool
from grpo.types import Message, Prompt

Result = dict[str, Any]
CUT = "... [cut: the result is longer than {limit} characters]"


class TurnWorkers:
    """Worker processes that hold all tools, and the environments of completions.

    Args:
        tools: name -> function.
        environment: class of the environment.
        environment_kwargs: arguments of its constructor.
        deadline: seconds for one call or step.
        max_result_length: characters of the result of a tool; the rest is cut.
        workers: number of processes. 0: in this process, without a deadline.
    """

    def __init__(
        self,
        tools: Mapping[str, Tool] | None = None,
        environment: type | None = None,
        environment_kwargs: Mapping[str, Any] | None = None,
        *,
        deadline: float = 10.0,
        max_result_length: int = 2000,
        workers: int = 2,
    ):
        self.tools, self.deadline, self.max_result_length = dict(tools or {}), deadline, max_result_length
        given: dict[str, Any] = {
            "tools": self.tools,
            "environment": environment,
            "environment_kwargs": dict(environment_kwargs or {}),
        }
        self._here: Callable[..., Any] = functools.partial(serving.answer, **given)
        elsewhere = _addresses(given)
        function: Any = self._here if elsewhere is None else serving.answer
        self._key = "tools" if environment is None else "environment"
        found: list[Callable[..., Any]] = [*self.tools.values()] if environment is None else [environment]
        self._functions = found if workers and elsewhere is not None else []  # a forked process loads no file
        self._sources = source_hashes(self._functions)
        self._loaded: set[Worker] = set()
        self._workers = [Worker("tools", function, elsewhere or {}) for _ in range(workers)]
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="tools") for _ in range(workers)]
        self._next = itertools.cycle(range(workers)) if workers else None
        _POOLS.add(self)

    def start(self) -> None:
        """Start the processes in the background."""
        for worker, thread in zip(self._workers, self._threads, strict=True):
            thread.submit(worker.start)

    def close(self) -> None:
        """End every process. Idempotent."""
        for worker, thread in zip(self._workers, self._threads, strict=True):
            worker.kill()
            thread.shutdown(wait=False, cancel_futures=True)

    def call(self, calls: list[Call]) -> Future[Step]:
        """Run the calls of one turn, side by side where processes are free."""
        futures = [self._submit_call(call) for call in calls]
        made = [{"name": call.name, "arguments": call.arguments} for call in calls]

        def joined() -> Step:
            texts = [future.result() for future in futures]
            messages: list[Message] = [
                {"role": "tool", "name": call.name or "unknown", "content": text}
                for call, (text, _) in zip(calls, texts, strict=True)
            ]
            return Step(messages, calls=made, failures=sum(failed for _, failed in texts))

        return _Lazy(joined)

    def reset(self, key: tuple[int, ...], prompt: Prompt) -> Future[list[Message] | None]:
        """Reset the environment of a completion. The future raises EngineError if that fails."""
        future = self._submit({"key": key, "prompt": serving.plain_prompt(prompt), "turns": []}, key[-1])

        def messages() -> list[Message] | None:
            result = future.result()
            if "error" in result:
                raise EngineError(f"environment: reset failed for prompt {prompt.draw}: {result['error']}")
            found: list[Message] | None = result["messages"]
            return found

        return _Lazy(messages)

    def step(self, key: tuple[int, ...], prompt: Prompt, turns: list[str]) -> Future[Step]:
        """Let the environment of a completion answer its newest turn. If it fails, the completion is done."""
        request = {"key": key, "prompt": serving.plain_prompt(prompt), "turns": list(turns)}
        future = self._submit(request, key[-1])

        def step() -> Step:
            result = future.result()
            if "error" in result:
                return Step(done=True, failures=1)
            return Step(**result)

        return _Lazy(step)

    def _submit_call(self, call: Call) -> Future[tuple[str, bool]]:
        """Return the text of the result, and whether the call failed."""
        problem = call.error
        if problem is None and call.name not in self.tools:
            problem = f"there is no tool '{call.name}'. Tools: {', '.join(self.tools)}"
        if problem is not None:
            return _Lazy(lambda: (f"error: {problem}", True))
        future = self._submit({"tool": call.name, "arguments": call.arguments})

        def text() -> tuple[str, bool]:
            result = future.result()
            found = f"error: {result['error']}" if "error" in result else str(result["text"])
            if len(found) > self.max_result_length:
                found = found[: self.max_result_length] + CUT.format(limit=self.max_result_length)
            return found, "error" in result

        return _Lazy(text)

    def _submit(self, request: dict[str, Any], place: int | None = None) -> Future[Result]:
        """Send a request to the process `place`, or to the next one."""
        if self._next is None:
            notes = Notes()
            self._here([request], notes.log_extra)
            return _Lazy(lambda: notes.extra["results"][0])
        at = next(self._next) if place is None else place % len(self._workers)
        return self._threads[at].submit(self._request, self._workers[at], request)

    def _request(self, worker: Worker, request: dict[str, Any]) -> Result:
        """Ask a process. It is killed at the deadline."""
        if worker not in self._loaded:
            self._check_sources()
            self._loaded.add(worker)
        try:
            worker.send({"requests": [request]}, TrainerState(), self.deadline)
            received = worker.receive(self.deadline)
        except RewardError as error:
            raise EngineError(f"tools: {str(error).partition(': ')[2]}") from error
        except (EOFError, OSError):
            self._loaded.discard(worker)
            return {"error": f"it {worker.exit_reason()}"}
        if received is None:
            self._loaded.discard(worker)
            worker.kill()
            return {"error": f"it gave no result within {self.deadline:g} s"}
        values, notes = received
        if isinstance(values, str) or "results" not in notes.extra:
            return {"error": str(values)}
        result: Result = notes.extra["results"][0]
        return result

    def _check_sources(self) -> None:
        """Raise EngineError if a file that a process is about to load has changed since the run began."""
        for file, sha256 in source_hashes(self._functions).items():
            before = self._sources.setdefault(file, sha256)
            if before != sha256:
                raise EngineError(
                    f"{self._key}: {file} was changed during the run (sha256 {before[:12]} -> {sha256[:12]}), so a "
                    f"process that starts now would answer by another rule. Put the old file back, or go on with the "
                    f"new one: --resume auto --allow_changes '[{self._key}]'"
                )


class _Lazy(Future):
    """A future whose result is computed when it is asked for, from other futures."""

    def __init__(self, compute: Any):
        super().__init__()
        self._compute = compute

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            self.set_result(self._compute())
        return super().result(timeout)


def _addresses(given: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of `serving.answer` with functions by their addresses. None if one has no address."""
    tools = {name: address_of(function, TOOLS) for name, function in given["tools"].items()}
    environment = given["environment"]
    place = None if environment is None else address_of(environment, ENVIRONMENTS)
    if None in tools.values() or (environment is not None and place is None):
        return None
    return {**given, "tools": tools, "environment": place}


_POOLS: "weakref.WeakSet[TurnWorkers]" = weakref.WeakSet()


def close_all() -> None:
    """End every process, at exit and before a forced exit."""
    for pool in list(_POOLS):
        pool.close()


atexit.register(close_all)
before_forced_exit(close_all)
