"""Dialogues: a completion of several turns, as one list of token ids.

    token_ids   call of a tool <end> | \\n<|im_start|>tool\\n ... assistant\\n | the answer <end>
                sampled                given                                   sampled

An engine asks for a Dialogue per completion. When a turn has ended, `end_turn` says whether something follows, and
`continuation` waits for it and returns the given ids. Nothing that was sampled is tokenised again.
"""

import itertools
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from grpo.config.schema import Config
from grpo.data.rendering import prompt_token_ids, template_arguments
from grpo.errors import ConfigError, EngineError
from grpo.registry import check_arguments
from grpo.rollout.engine import completion_text, hidden_token_ids
from grpo.turns.calls import format_of, parse_calls
from grpo.turns.environment import Step, find_environment
from grpo.turns.template import TurnTemplate
from grpo.turns.tools import find_tools, schema_of
from grpo.turns.workers import TurnWorkers
from grpo.types import Completion, Message, Prompt


class Turns:
    """Messages between the turns of completions: results of tools, or those of an environment.

    Args:
        tokenizer: the tokenizer of the policy.
        end_ids: token ids that end a turn.
        workers: processes that run the tools or the environment.
        has_environment: turns are answered by an environment; otherwise calls in them by tools.
        max_iterations: largest number of turns with calls that are answered. None: no limit.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_ids: Sequence[int],
        workers: TurnWorkers,
        *,
        has_environment: bool = False,
        max_iterations: int | None = None,
    ):
        self.tokenizer, self.workers = tokenizer, workers
        self.has_environment, self.max_iterations = has_environment, max_iterations
        self.hidden_ids = hidden_token_ids(end_ids, tokenizer)
        self.template = TurnTemplate(tokenizer, end_ids)
        self.style = format_of(tokenizer)
        self.schemas = [schema_of(name, function) for name, function in workers.tools.items()]
        self._calls = itertools.count()
        self._call = 0

    def begin(self, prompts: list[Prompt], samples: int) -> list[Prompt]:
        """Begin a call of the engine, and return the prompts that the policy reads: those of the environment.

        Raises:
            EngineError: an environment cannot be reset, or gives the completions of a prompt different messages.
        """
        self._call = next(self._calls)
        if not self.has_environment:
            return prompts
        futures = [
            [self.workers.reset(self._key(p, sample, samples), prompt) for sample in range(samples)]
            for p, prompt in enumerate(prompts)
        ]
        return [self._after_reset(prompt, own) for prompt, own in zip(prompts, futures, strict=True)]

    def dialogue(self, prompt: Prompt, index: int, sample: int, samples: int) -> "Dialogue":
        """Return the dialogue of a completion.

        Args:
            prompt: its prompt, as `begin` returned it.
            index: index of the prompt in the call of the engine.
            sample: index of the completion in its group.
            samples: completions per prompt.
        """
        return Dialogue(self, prompt, self._key(index, sample, samples))

    def follow(self, dialogue: "Dialogue", text: str) -> Future[Step] | None:
        """Start what follows a turn. None: nothing does."""
        if self.has_environment:
            return self.workers.step(dialogue.key, dialogue.prompt, dialogue.texts)
        if self.max_iterations is not None and len(dialogue.given) >= self.max_iterations:
            return None
        before = self.tokenizer.decode(dialogue.new_ids or list(dialogue.prompt.token_ids))
        calls = parse_calls(text, self.style, self.tokenizer, tools=self.schemas, prefix=before)
        return self.workers.call(calls) if calls else None

    def close(self) -> None:
        """End the processes."""
        self.workers.close()

    def _key(self, index: int, sample: int, samples: int) -> tuple[int, int]:
        return self._call, index * samples + sample

    def _after_reset(self, prompt: Prompt, futures: list[Future[list[Message] | None]]) -> Prompt:
        found = [future.result() for future in futures]
        if any(messages != found[0] for messages in found):
            raise EngineError(
                f"environment: reset gave the completions of prompt {prompt.draw} different messages, so they cannot "
                f"be compared with each other: seed random choices with prompt.draw"
            )
        messages = found[0]
        if messages is None:
            return prompt
        if not messages:
            raise EngineError(f"environment: reset gave no message for prompt {prompt.draw}: return None to keep it")
        ids = prompt_token_ids(messages, self.tokenizer, template_arguments(prompt.columns))
        return replace(prompt, messages=messages, token_ids=tuple(ids))


class Dialogue:
    """One completion while it is sampled."""

    def __init__(self, turns: Turns, prompt: Prompt, key: tuple[int, int]):
        self.turns, self.prompt, self.key = turns, prompt, key
        self.messages: list[Message] = []
        self.texts: list[str] = []
        """Turns of the policy."""
        self.given: list[list[int]] = []
        self.calls = self.failures = 0
        self.reward: float | None = None
        self.cut = False
        """What follows the last turn did not fit into the completion."""
        self.new_ids: list[int] = []
        """Ids of the last continuation."""
        self._begin = 0
        self._next: Future[Step] | None = None

    def end_turn(self, token_ids: list[int], ended: bool) -> bool:
        """Record the newest turn and start what follows it.

        Args:
            token_ids: all ids of the completion so far.
            ended: the policy drew an end token. A turn that was cut off is not parsed.

        Returns:
            Whether something may follow: call `continuation`.
        """
        text = completion_text(token_ids[self._begin :], self.turns.hidden_ids, self.turns.tokenizer)
        self.texts.append(text)
        self.messages.append({"role": "assistant", "content": text, "tokens": len(token_ids) - self._begin})
        self._next = self.turns.follow(self, text) if ended else None
        return self._next is not None

    def continuation(self, token_ids: list[int], longest: int) -> list[int]:
        """Wait for what follows, and return the given ids. Empty: the completion ends here.

        Args:
            token_ids: all ids of the completion so far.
            longest: sampling.max_completion_length. What follows must leave room for a token.
        """
        assert self._next is not None, "end_turn comes first"
        step, self._next = self._next.result(), None
        self.calls += len(step.calls)
        self.failures += step.failures
        self.reward = self.reward if step.reward is None else step.reward
        if step.calls:
            self.messages[-1]["tool_calls"] = step.calls
        if step.done or not step.messages:
            self.messages += step.messages
            return []
        new = self.turns.template.given_ids(step.messages, template_arguments(self.prompt.columns))
        start = len(token_ids)
        if start + len(new) >= longest:
            self.cut = True
            return []
        self.messages += step.messages
        self.given.append([start, start + len(new)])
        self.new_ids = new
        self._begin = start + len(new)
        return new

    def completion(self, token_ids: list[int], logprobs: list[float], ended: bool) -> Completion:
        """Return the completion: truncated if the last turn was, or if what follows it did not fit."""
        turns = {
            "messages": self.messages,
            "reward": self.reward,
            "calls": self.calls,
            "failures": self.failures,
        }
        return Completion(token_ids, logprobs, ended and not self.cut, self.texts[-1], self.given, turns)


def has_turns(config: Config) -> bool:
    """Return whether completions may have several turns."""
    return bool(config.tools or config.environment)


def recorded_columns(prompt: Prompt, without: Collection[str]) -> dict[str, Any]:
    """Return the columns of a prompt for the records, without the schemas of tools, which config.yaml has."""
    columns = {key: value for key, value in prompt.columns.items() if key not in without}
    settings = columns.get("chat_template_kwargs")
    if isinstance(settings, dict) and "tools" in settings:
        left = {key: value for key, value in settings.items() if key != "tools"}
        columns |= {"chat_template_kwargs": left}
        if not left:
            del columns["chat_template_kwargs"]
    return columns


def offer_tools(config: Config) -> None:
    """Put the schemas of the tools into data.chat_template_kwargs, so that every rendering shows them.

    Raises:
        ConfigError: a tool or an argument of the environment cannot be used, or `tools` and `environment` are both
            set.
    """
    if config.environment:
        if config.tools:
            raise ConfigError(
                "tools and environment are both set: let the environment call the tools (grpo.turns.calls), or remove "
                "one of them"
            )
        kind = find_environment(config.environment)
        label = f"environment '{config.environment}'"
        check_arguments(label, kind, (), config.environment_kwargs, "environment_kwargs", "no arguments")
    if not config.tools:
        return
    functions = find_tools(config.tools, trust_model_code=config.turns.trust_model_code)
    if config.turns.show_tools:
        schemas = [schema_of(name, function) for name, function in functions.items()]
        config.data.chat_template_kwargs = {**config.data.chat_template_kwargs, "tools": schemas}


def check_turns(config: Config, tokenizer: Any, end_ids: Sequence[int]) -> None:
    """Check the chat template, before any weights load.

    Raises:
        ConfigError: it cannot render several turns, or changes earlier ones (turns.rewritten_history).
    """
    if has_turns(config):
        role = "tool" if config.tools else getattr(find_environment(str(config.environment)), "role", "user")
        keeps = config.turns.rewritten_history == "refuse"
        arguments = template_arguments({"chat_template_kwargs": config.data.chat_template_kwargs})
        TurnTemplate(tokenizer, end_ids).check(role, arguments, keeps_history=keeps)


def build_turns(config: Config, tokenizer: Any, end_ids: Sequence[int]) -> Turns | None:
    """Return what follows the turns of completions, with its processes. None: nothing does."""
    if not has_turns(config):
        return None
    settings = config.turns
    workers = TurnWorkers(
        find_tools(config.tools, trust_model_code=settings.trust_model_code),
        find_environment(config.environment) if config.environment else None,
        config.environment_kwargs,
        deadline=settings.deadline,
        max_result_length=settings.max_result_length,
        workers=settings.workers,
    )
    workers.start()
    limit = settings.max_tool_calling_iterations
    return Turns(tokenizer, end_ids, workers, has_environment=bool(config.environment), max_iterations=limit)
