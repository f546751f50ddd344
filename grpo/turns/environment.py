"""Environments: what follows each turn of the policy.

    prompt -> reset -> turn of the policy -> step -> messages -> turn of the policy -> step -> ... -> done

An environment is a class that config.environment names. Each completion has its own object. Objects live in worker
processes (grpo/turns/workers.py), so a step may block, crash or never return. `reset` and `step` may be async.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from grpo.errors import ConfigError
from grpo.registry import Registry
from grpo.types import Message, Prompt


@dataclass
class Step:
    """The messages after one turn, with reward and end."""

    messages: list[Message] = field(default_factory=list)
    reward: float | None = None
    done: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)
    """Tool calls of the turn: name and arguments."""
    failures: int = 0
    """Calls, or steps, that failed. The policy reads their error as the result."""


StepResult = tuple[list[Message], float | None, bool] | Step
"""(messages that follow the turn, reward so far or None, the completion is done), or a Step, which counts calls."""


@runtime_checkable
class Environment(Protocol):
    """Protocol of an environment. Its constructor takes environment_kwargs.

    A class attribute `role` "tool" says that its messages have this role, not "user": the chat template is checked
    with it.
    """

    def reset(self, prompt: Prompt) -> list[Message] | None:
        """Begin a completion of `prompt`.

        Returns:
            The messages that the policy reads, or None: the messages of the prompt. They must be the same for all
            completions of a prompt, which are compared with each other: seed random choices with `prompt.draw`.
        """
        ...

    def step(self, completion: str) -> StepResult:
        """Answer one turn of the policy.

        Args:
            completion: text of the turn, without end tokens.

        Returns:
            The messages that follow, the reward so far (None: unknown), and whether the completion is done; or a Step,
            which counts tool calls, too. After `done`, or without messages, the policy has no further turn. The last
            reward that is not None counts.
        """
        ...


ENVIRONMENTS: Registry[type[Environment]] = Registry("environment", "grpo.turns", key="environment")
register_environment = ENVIRONMENTS.register


def find_environment(name: str) -> type[Environment]:
    """Return the environment class for a registered name, package.module:Class or path/file.py:Class.

    Raises:
        ConfigError: there is none, or it has no reset and step.
    """
    found = ENVIRONMENTS.get(name)
    if not (isinstance(found, type) and callable(getattr(found, "reset", None)) and callable(found.step)):
        raise ConfigError(
            f"environment is '{name}', which is not a class with reset(prompt) and step(completion): see "
            "grpo.turns.environment.Environment"
        )
    return found


def checked_messages(messages: Any) -> list[Message]:
    """Return the messages of an environment.

    Raises:
        ValueError: they are not a list of {"role": ..., "content": text}.
    """
    if not isinstance(messages, list) or not all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    ):
        raise ValueError(f'messages are {str(messages)[:120]!r}, must be a list of {{"role": ..., "content": text}}')
    return messages
