"""Environments of verifiers (0.2 and 0.3): their own rollout runs, and asks this trainer for each turn of the policy.

    verifiers     env.rollout(row, client) -> client.get_response(messages) ... waits ... -> get_response(messages) ...
    this trainer  reset -> messages         step(turn) -> answers the waiting call, returns the messages since then

The reward is that of the environment's rubric, once its rollout has ended. A completion that is cut off has none.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import json
import threading
import weakref
from collections.abc import Coroutine, Mapping
from typing import Any, ClassVar, Literal

from grpo.data.verifiers import load_environment, plain_message
from grpo.turns.calls import Call, parse_calls
from grpo.turns.environment import Step, register_environment
from grpo.types import Message, Prompt


@register_environment("verifiers")
class VerifiersEnvironment:
    """An environment of verifiers whose messages between turns are those of a user.

    Args:
        environment: Id of the environment: the name of a module with `load_environment`.
        arguments: Arguments of its `load_environment`.
        calls: Format of tool calls in a turn (grpo/turns/calls.py).
    """

    role: ClassVar[str] = "user"

    def __init__(
        self,
        environment: str,
        arguments: Mapping[str, Any] | None = None,
        calls: Literal["tags", "json", "mistral"] = "tags",
    ):
        self.environment, self.format = load_environment(environment, arguments), calls
        self.names: dict[str, str] = {}
        """Id of a call -> name of its tool."""
        self.known: list[Message] = []
        """Messages that the policy has read or written."""

    def reset(self, prompt: Prompt) -> list[Message] | None:
        """Begin the rollout of a row, and return its prompt.

        Raises:
            RuntimeError: The environment ends it before the first turn.
        """
        row = {key: value for key, value in prompt.columns.items() if key not in ("tools", "chat_template_kwargs")}
        self.exchange = _Exchange(self.environment, {**row, "prompt": prompt.messages})
        asked = self.exchange.next()
        if asked is None:
            raise RuntimeError(f"the rollout ended before the first turn: {self.exchange.state.get('error')!r}")
        self.known = [plain_message(message) for message in asked]
        return self.known

    def step(self, completion: str) -> Step:
        """Give the rollout a turn of the policy.

        Raises:
            RuntimeError: The environment reports an error.
            ValueError: It changes earlier messages.
        """
        calls = parse_calls(completion, self.format)
        before = len(self.known) + 1
        ids = [f"call_{before}_{number}" for number in range(len(calls))]
        self.names |= {key: call.name for key, call in zip(ids, calls, strict=True)}
        asked = self.exchange.answer(completion, list(zip(ids, calls, strict=True)))
        made = [{"name": call.name, "arguments": call.arguments} for call in calls]
        failures = sum(call.error is not None for call in calls)
        if asked is None:
            state = self.exchange.state
            if state.get("error") is not None:
                raise RuntimeError(repr(state["error"]))
            whole = [*state["prompt"], *(state["completion"] or [])]
            new = [plain_message(message, self.names) for message in whole[before:]]
            ran = bool(new)  # calls of a last turn, after which the environment stops, are not run
            return Step(new, self.exchange.reward(), True, made if ran else [], failures if ran else 0)
        messages = [plain_message(message, self.names) for message in asked]
        earlier = [message["content"] for message in messages[: before - 1]]
        if earlier != [message["content"] for message in self.known]:
            raise ValueError("the environment changes earlier messages, which the policy has read already")
        self.known = messages
        return Step(messages[before:], None, False, made, failures)


@register_environment("verifiers_tools")
class VerifiersToolEnvironment(VerifiersEnvironment):
    """An environment of verifiers whose messages between turns are results of tools."""

    role: ClassVar[str] = "tool"


class _Exchange:
    """A rollout in the background, and the two ends of its questions. Without its exchange, a rollout is cancelled."""

    def __init__(self, environment: Any, row: dict[str, Any]):
        self.environment, self.state = environment, dict[str, Any]()
        self.asked: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.given: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.task = _submit(_run(weakref.proxy(self), environment, row))
        weakref.finalize(self, self.task.cancel)

    def next(self) -> list[Any] | None:
        """Wait for the messages that the rollout wants to have continued. None: it has ended."""
        found: list[Any] | None = self.asked.result()
        return found

    def answer(self, text: str, calls: list[tuple[str, Call]]) -> list[Any] | None:
        """Give a turn, and wait for what follows."""
        given, self.asked, self.given = self.given, concurrent.futures.Future(), concurrent.futures.Future()
        given.set_result(_response(text, calls))
        return self.next()

    def reward(self) -> float:
        """Return the rubric's reward of a rollout that has ended."""
        _submit(self.environment.rubric.score_rollout(self.state)).result()
        return float(self.state["reward"])


async def _run(exchange: Any, environment: Any, row: dict[str, Any]) -> None:
    """Run the rollout. `exchange` is a weak reference: a rollout that waits must not keep it."""
    try:
        exchange.state = await environment.rollout(row, _client_type()(exchange), "policy", {})
        exchange.asked.set_result(None)
    except Exception as error:  # code of the environment's author
        with contextlib.suppress(ReferenceError):
            exchange.asked.set_exception(error)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all rollouts in this process, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="verifiers").start()
    return loop


def _submit(work: Coroutine[Any, Any, Any]) -> "concurrent.futures.Future[Any]":
    return asyncio.run_coroutine_threadsafe(work, _loop())


@functools.cache
def _client_type() -> type:
    """Return a client of verifiers that asks an exchange instead of a server."""
    from verifiers.clients.client import Client

    async def get_response(self: Any, prompt: list[Any], model: str, sampling_args: Any, **given: Any) -> Any:
        self.client.asked.set_result(prompt)
        return await asyncio.wrap_future(self.client.given)

    async def unused(self: Any, *arguments: Any, **given: Any) -> Any:
        raise NotImplementedError("this client speaks no protocol of a server")

    async def close(self: Any) -> None: ...

    body = dict.fromkeys(Client.__abstractmethods__, unused)
    return type("PolicyClient", (Client,), {**body, "get_response": get_response, "close": close})


def _response(text: str, calls: list[tuple[str, Call]]) -> Any:
    """Return a turn as a response of verifiers."""
    from verifiers.types import Response, ResponseMessage, ToolCall

    made = [
        ToolCall(id=key, name=call.name, arguments="" if call.error is not None else json.dumps(call.arguments))
        for key, call in calls
    ]
    message = ResponseMessage(
        content=text,
        tool_calls=made or None,
        finish_reason="tool_calls" if made else "stop",
        is_truncated=False,
    )
    return Response(id="turn", created=0, model="policy", message=message)
