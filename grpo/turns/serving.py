"""Serving: requests -> results of tools and environments, inside of a worker process.

The function `answer` has the signature of a reward, so that the worker processes of rewards can hold it. Its results go
the way of a reward's `log_extra`: as JSON.
"""

from collections.abc import Callable, Mapping
from typing import Any

from grpo.rewards.calls import finished
from grpo.turns.environment import Environment, Step, checked_messages, find_environment
from grpo.turns.tools import TOOLS, call_tool, tool_name
from grpo.types import Prompt

_objects: dict[tuple[int, ...], tuple[Environment, int]] = {}
"""Identity of a completion -> its environment, and the number of turns that it has answered."""


def answer(
    requests: list[dict[str, Any]],
    log_extra: Callable[[str, list[Any]], None],
    *,
    tools: Mapping[str, Any] | None = None,
    environment: Any = None,
    environment_kwargs: Mapping[str, Any] | None = None,
) -> list[float]:
    """Answer requests. The results are recorded as the column "results".

    Args:
        requests: {"tool": name, "arguments": {...}}, or {"key": identity, "prompt": Prompt, "turns": texts}: the
            identity of a completion and all turns of the policy so far (none: reset).
        log_extra: takes the results: {"text": ...}, {"messages": ...}, the fields of a Step, or {"error": ...}.
        tools: name -> function or its address.
        environment: the class or its address.
        environment_kwargs: arguments of its constructor.

    Returns:
        A 0 for each request.
    """
    functions = {name: TOOLS.get(one) if isinstance(one, str) else one for name, one in (tools or {}).items()}
    kind = find_environment(environment) if isinstance(environment, str) else environment
    results = []
    for request in requests:
        try:
            if "tool" in request:
                function = functions[request["tool"]]
                results.append({"text": call_tool(function, request["arguments"])})
            else:
                results.append(_stepped(kind, environment_kwargs or {}, request))
        except BaseException as error:  # BaseException: a tool may call sys.exit
            results.append({"error": f"{type(error).__name__}: {error}"[:500]})
    log_extra("results", results)
    return [0.0] * len(requests)


def _stepped(kind: Any, kwargs: Mapping[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Reset an environment, or let it answer the newest turn.

    An object that is not here any more, because its process was killed for another one, is made again from its turns.
    """
    key, turns, prompt = tuple(request["key"]), request["turns"], request["prompt"]
    for old in [known for known in _objects if known[0] != key[0]]:  # of an earlier call of the engine
        del _objects[old]
    held = _objects.pop(key, None) if turns else None
    messages: Any = None
    if held is None or held[1] != len(turns) - 1:
        held = kind(**kwargs), 0
        messages = finished(held[0].reset(prompt))
        for text in turns[:-1]:
            finished(held[0].step(text))
    if not turns:
        _objects[key] = held[0], 0
        return {"messages": None if messages is None else checked_messages(messages)}
    step = finished(held[0].step(turns[-1]))
    if not isinstance(step, Step):
        new, reward, done = step
        step = Step(list(new), reward, done)
    if not step.done:
        _objects[key] = held[0], len(turns)
    return {
        "messages": checked_messages(step.messages),
        "reward": None if step.reward is None else float(step.reward),
        "done": bool(step.done),
        "calls": step.calls,
        "failures": step.failures,
    }


def function_names(tools: Mapping[str, Any]) -> list[str]:
    """Return the names of tools, in order."""
    return [tool_name(function) for function in tools.values()]


def plain_prompt(prompt: Prompt) -> Prompt:
    """Return the part of a prompt that an environment reads."""
    return Prompt(prompt.draw, prompt.messages, (), prompt.columns)
