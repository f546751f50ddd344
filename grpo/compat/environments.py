"""Tools and environments of TRL: callables and factories -> config keys, an environment class, and rewards.

    tools=[add]                   tools: ["package.module:add"], or a name for a function of the script itself
    environment_factory=Game      environment: a class that resets a Game, and calls its methods as tools

An environment of TRL is an object with `reset(**row) -> text or None`, public methods that are tools, and maybe
`get_reward() -> float`. It lives in the training process, as in TRL, so that rewards can read it.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from grpo.errors import ConfigError
from grpo.rewards.calls import finished
from grpo.rewards.worker_process import address_of
from grpo.turns.calls import format_of, parse_calls
from grpo.turns.environment import Step
from grpo.turns.tools import TOOLS, Tool, call_tool, schema_of, tool_name
from grpo.types import Message, Prompt

ENVIRONMENT = "environment_factory"
"""Name in the config of the environments that GRPOTrainer was given."""
DEADLINE = 60.0
"""Seconds for a call of a tool in a worker process."""
MAX_RESULT_LENGTH = 1_000_000
"""Characters of a result: in TRL, sampling.max_completion_length alone limits it."""
NO_TOOLS = ("reset", "get_reward")
EMPTY_PROMPT: list[Message] = [{"role": "user", "content": ""}]
"""Prompt of a row without one, which the text of `reset` completes."""


class OpenedPrompt(list[Message]):
    """The messages that the policy reads of a prompt, with the environments of its completions.

    Args:
        messages: The messages.
        group: Environments of all completions of the prompt, in order.
    """

    def __init__(self, messages: Iterable[Message], group: "list[TrlEnvironment]"):
        super().__init__(messages)
        self.group, self.start = group, len(group)

    def __reduce__(self) -> Any:
        """Other processes and files get the messages alone."""
        return list, (list(self),)


@dataclass
class GivenTurns:
    """`tools` and `environment_factory` of a GRPOTrainer."""

    tools: dict[str, Tool] = field(default_factory=dict)
    """Name in the config -> function."""
    factories: dict[str | None, Callable[[], Any]] = field(default_factory=dict)
    """Value of the column `environment` -> factory; None: of all rows."""
    kinds: dict[str | None, type] = field(default_factory=dict)
    pools: dict[str | None, list[Any]] = field(default_factory=dict)
    """Environments that are free. They are made once and reset often, as in TRL."""
    schemas: dict[str | None, list[dict[str, Any]]] = field(default_factory=dict)
    """Value of the column `environment` -> schemas of the tools. Without environments: None -> those of `tools`."""

    @property
    def routed(self) -> bool:
        """Each row names its environment."""
        return bool(self.factories) and None not in self.factories

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of a row, with the schemas of its environment.

        Raises:
            ConfigError: It names no environment of these.
        """
        if not self.routed:
            return dict(row)
        name = row.get("environment")
        if name not in self.factories:
            raise ConfigError(
                f"the environment is {name!r}, needs one of environment_factory: {', '.join(map(str, self.factories))}"
            )
        own = row.get("chat_template_kwargs") or {}
        return (
            {**row, "chat_template_kwargs": {**own, "tools": self.schemas[name]}} if self.schemas[name] else dict(row)
        )

    def live_tools(self) -> dict[str, Tool]:
        """Return the tools that no other process can import."""
        return {name: tool for name, tool in self.tools.items() if address_of(tool, TOOLS) != name}

    def values(self, template: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the values of config keys.

        Args:
            template: chat_template_kwargs of the GRPOConfig.
        """
        if not self.tools and not self.factories:
            return {}
        found: dict[str, Any] = {
            "turns.deadline": DEADLINE,
            "turns.max_result_length": MAX_RESULT_LENGTH,
            "turns.rewritten_history": "keep",
            "turns.workers": 0 if self.factories or self.live_tools() else 2,
        }
        if not self.factories:
            return found | {"tools": list(self.tools)}
        shown = {} if self.routed or not self.schemas[None] else {"tools": self.schemas[None]}
        return found | {"environment": ENVIRONMENT, "data.chat_template_kwargs": {**(template or {}), **shown}}

    def rewards(self) -> list[Callable[..., Any]]:
        """Return a reward for each class of environments with `get_reward`."""
        kinds = dict.fromkeys(kind for kind in self.kinds.values() if callable(getattr(kind, "get_reward", None)))
        return [own_reward(kind) for kind in kinds]

    def environment(self, tokenizer: Any, max_iterations: int | None) -> type["TrlEnvironment"]:
        """Return the class that the config names.

        Args:
            tokenizer: It decides the format of calls.
            max_iterations: Largest number of turns with calls.
        """
        settings = {"given": self, "tokenizer": tokenizer, "max_iterations": max_iterations}
        made: type[TrlEnvironment] = type("GivenEnvironment", (TrlEnvironment,), settings)
        return made


def given_turns(tools: Any, environment_factory: Any) -> GivenTurns:
    """Return what a GRPOTrainer was given, after making one environment of each factory.

    Raises:
        ConfigError: Something cannot be used.
    """
    given = GivenTurns()
    for tool in tools or []:
        if not callable(tool):
            raise ConfigError(f"tools has {tool!r:.80} ({type(tool).__name__}), needs to be functions")
        name = address_of(tool, TOOLS) or f"{getattr(tool, '__module__', None) or 'script'}:{tool_name(tool)}"
        schema_of(tool_name(tool), tool)  # raises ConfigError
        given.tools[name] = tool
    _check_names(tools or [])
    given.schemas[None] = [schema_of(name, tool) for name, tool in given.tools.items()]
    if environment_factory is None:
        return given
    del given.schemas[None]
    given.factories = (
        dict(environment_factory) if isinstance(environment_factory, Mapping) else {None: environment_factory}
    )
    for row, factory in given.factories.items():
        if not callable(factory):
            raise ConfigError(f"environment_factory is {factory!r:.80}, needs to be a function or a class")
        instance = factory()
        kind = type(instance)
        if not callable(getattr(kind, "reset", None)):
            raise ConfigError(f"environment_factory: {kind.__name__} has no method reset(**row): add one")
        given.kinds[row], given.pools[row] = kind, [instance]
        functions = [*given.tools.values(), *methods_of(instance).values()]
        _check_names(functions)
        given.schemas[row] = [schema_of(f"{kind.__name__}.{tool_name(one)}", one) for one in functions]
    return given


def _check_names(functions: Iterable[Tool]) -> None:
    names = [tool_name(function) for function in functions]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"tools: two tools are called '{name}': rename one of the functions")


def methods_of(instance: Any) -> dict[str, Tool]:
    """Return the public methods of an environment, which are its tools."""
    found = inspect.getmembers(type(instance), predicate=inspect.isfunction)
    return {name: getattr(instance, name) for name, _ in found if name not in NO_TOOLS and not name.startswith("_")}


class TrlEnvironment:
    """An environment of TRL with the protocol of this trainer, for one completion. Subclasses set the attributes."""

    given: ClassVar[GivenTurns]
    tokenizer: ClassVar[Any]
    max_iterations: ClassVar[int | None]
    role: ClassVar[str] = "tool"
    _newest: ClassVar[tuple[Any, int, "list[TrlEnvironment]"] | None] = None
    """The columns and the draw of the prompt that was reset last, and the environments of its completions."""

    def reset(self, prompt: Prompt) -> list[Message]:
        """Reset an environment with the columns of the row. Its text is added to the last message."""
        if isinstance(prompt.messages, str):
            raise ValueError("the prompt is text, needs to be messages, so that the chat template can show tools")
        given, columns = self.given, dict(prompt.columns)
        columns.pop("chat_template_kwargs", None)
        name = columns.pop("environment", None) if given.routed else None
        pool = given.pools[name]
        self.instance = pool.pop() if pool else given.factories[name]()
        weakref.finalize(self, pool.append, self.instance)
        self.functions = {tool_name(tool): tool for tool in given.tools.values()} | methods_of(self.instance)
        self.schemas, self.iterations = given.schemas[name], 0
        known = {} if prompt.messages == EMPTY_PROMPT else {"prompt": prompt.messages}
        observation = finished(self.instance.reset(**known, **columns))
        *messages, last = prompt.messages
        if observation is not None:
            if not isinstance(observation, str):
                raise TypeError(f"reset returned a {type(observation).__name__}, must return a text or None")
            last = {**last, "content": last["content"] + observation}
        kind = type(self)
        if kind._newest is None or kind._newest[0] is not prompt.columns or kind._newest[1] != prompt.draw:
            kind._newest = (prompt.columns, prompt.draw, [])
        opened = OpenedPrompt([*messages, last], kind._newest[2])
        opened.group.append(self)
        return opened

    def step(self, completion: str) -> Step:
        """Call the tools of a turn."""
        calls = parse_calls(completion, format_of(self.tokenizer), self.tokenizer, tools=self.schemas)
        if not calls or (self.max_iterations is not None and self.iterations >= self.max_iterations):
            return Step(done=True)
        self.iterations += 1
        answer = Step(calls=[{"name": call.name, "arguments": call.arguments} for call in calls])
        for call in calls:
            problem, text = call.error, ""
            if problem is None and call.name not in self.functions:
                problem = f"there is no tool '{call.name}'. Tools: {', '.join(self.functions)}"
            if problem is None:
                try:
                    text = call_tool(self.functions[call.name], call.arguments)
                except Exception as error:  # the policy reads it
                    problem = f"{type(error).__name__}: {error}"[:500]
            answer.failures += problem is not None
            content = text if problem is None else f"error: {problem}"
            answer.messages.append({"role": "tool", "name": call.name or "unknown", "content": content})
        return answer


def environments_of(prompts: Sequence[Any]) -> list[Any]:
    """Return the environment of each completion, from the prompts that a reward gets, group by group."""
    found, place = [], 0
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, OpenedPrompt):
            raise ValueError("the environments of these completions are gone: they belong to another process")
        place = place + 1 if number and prompts[number - 1] is prompt else 0
        found.append(prompt.group[prompt.start + place].instance)
    return found


def with_environments(function: Any) -> Any:
    """Return a reward that gets `environments`, as in TRL, if it takes them; otherwise `function` itself."""
    if not callable(function) or hasattr(function, "forward"):
        return function
    own = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    if "environments" not in own and not takes_all:
        return function

    def score(**arguments: Any) -> Any:
        environments = environments_of(arguments["prompts"])
        if "prompts" not in own and not takes_all:
            del arguments["prompts"]
        return function(environments=environments, **arguments)

    shown = [parameter for name, parameter in own.items() if name != "environments"]
    if "prompts" not in own and not takes_all:
        shown.append(inspect.Parameter("prompts", inspect.Parameter.KEYWORD_ONLY))
    functools.update_wrapper(score, function)
    score.__name__ = getattr(function, "__name__", type(function).__name__)
    score.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return score


def own_reward(kind: Any) -> Callable[..., list[float | None]]:
    """Return the reward of environments of one class: `get_reward()` of each, None for others."""

    def get_reward(prompts: list[Any]) -> list[float | None]:
        return [finished(one.get_reward()) if type(one) is kind else None for one in environments_of(prompts)]

    get_reward.__name__, get_reward.__module__ = kind.__name__, kind.__module__
    return get_reward
