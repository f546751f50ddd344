"""Given tokens: the messages between two turns of the policy -> the token ids that the chat template puts there.

    sampled      ... <tool_call>{...}</tool_call><|im_end|>
    given                                                  \\n<|im_start|>user\\n<tool_response>...<|im_end|>\\n
                                                           <|im_start|>assistant\\n
    sampled                                                                        The answer is 7.<|im_end|>

The template renders a short conversation whose assistant's turn is a marker, and the messages behind it. What follows
the marker and its end token is given. Sampled tokens are never rendered or tokenised again, so the context of a later
turn is, id for id, what was sampled before. A template that renders an earlier turn differently once another one
follows (it drops the thinking, for example) would show the model another context at inference: `check` finds it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from grpo.data.rendering import apply_template
from grpo.errors import ConfigError
from grpo.types import Message

MARKER, QUESTION = "TURN9TEXT", "USER9TEXT"
THINKING = "<think>\nTHINK9TEXT\n</think>\n\n"


class TurnTemplate:
    """Renders what stands between two turns of the policy.

    Args:
        tokenizer: its chat template is applied.
        end_ids: token ids that end a turn.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]):
        self.tokenizer = tokenizer
        self.ends = sorted(
            {str(text) for text in tokenizer.convert_ids_to_tokens(list(end_ids))}, key=len, reverse=True
        )
        added = getattr(tokenizer, "added_tokens_decoder", {})
        specials = {str(token.content) for token in added.values() if token.special} | set(self.ends)
        self.specials = [text for text in specials if text.strip()]
        self._as_user: dict[str, bool] = {}

    def given_ids(self, messages: list[Message], arguments: Mapping[str, Any]) -> list[int]:
        """Return the ids of `messages`, with the rest of the turn before them and the beginning of the next one.

        Args:
            messages: messages that follow a turn of the policy. Special tokens in their contents are taken apart, so
                that a result cannot end its own turn.
            arguments: arguments of the chat template (`grpo.data.rendering.template_arguments`).

        Raises:
            ConfigError: the template cannot render them.
        """
        safe = [{**message, "content": self.defused(str(message["content"]))} for message in messages]
        text = self._after_turn(safe, arguments)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def defused(self, text: str) -> str:
        """Return `text` with a space inside of each special token of the tokenizer: "<|im_end|>" -> "< |im_end|>"."""
        for special in self.specials:
            text = text.replace(special, f"{special[0]} {special[1:]}") if len(special) > 1 else text
        return text

    def check(self, role: str, arguments: Mapping[str, Any], *, keeps_history: bool = True) -> None:
        """Check that the template puts turns one after the other, and changes none of them later.

        Args:
            role: role of the messages between turns: "tool" or "user".
            arguments: arguments of the chat template.
            keeps_history: refuse a template that renders an earlier turn differently later.

        Raises:
            ConfigError: the template cannot render such a conversation, or changes earlier turns.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "tools and environments need a chat template, which says how a turn ends and the next one begins, but "
                "the model has none: choose a model with a chat template"
            )
        between: list[Message] = [{"role": role, "content": "RESULT9TEXT", **_name(role)}]
        first = self._rendered([{"role": "user", "content": QUESTION}], arguments)
        given = self._after_turn(between, arguments)  # raises if the template has no place for them
        if not keeps_history:
            return
        turns = [MARKER]
        if "</think>" in str(self.tokenizer.chat_template) and not first.rstrip().endswith(("</think>", "<think>")):
            turns.append(THINKING + MARKER)
        for turn in turns:
            end = self._end_of_turn(self._rendered(self._conversation(turn, between, arguments), arguments))
            before = first + turn + end + given
            once = self._rendered(self._conversation(turn, between, arguments), arguments)
            more = [*between, {"role": "assistant", "content": turn}, *between]
            twice = self._rendered(self._conversation(turn, more, arguments), arguments)
            if once != before or twice != before + turn + end + given:
                found = next((f for f, e in ((once, before), (twice, before + turn + end + given)) if f != e), once)
                raise ConfigError(
                    f"the chat template changes earlier turns when a later one follows: {_shown(before, found)}. The "
                    f"model would read another context at inference than in training. Set turns.rewritten_history "
                    f"keep to train on turns as they were sampled, or use a chat template that keeps them"
                )

    def _conversation(self, turn: str, messages: list[Message], arguments: Mapping[str, Any]) -> list[Message]:
        answer = {"role": "assistant", "content": turn}
        if self._results_as_user(arguments):
            messages = [_as_user(message) for message in messages]
        return [{"role": "user", "content": QUESTION}, answer, *messages]

    def _after_turn(self, messages: list[Message], arguments: Mapping[str, Any]) -> str:
        """Return the text between the end token of a turn and the next turn."""
        try:
            text = self._rendered(self._conversation(MARKER, messages, arguments), arguments)
        except (TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise ConfigError(f"the chat template cannot render messages of {roles} after a turn: {error}") from error
        return text.partition(MARKER)[2].removeprefix(self._end_of_turn(text))

    def _end_of_turn(self, text: str) -> str:
        """Return the end token after the marker."""
        if MARKER not in text:
            raise ConfigError(
                "the chat template leaves out a turn of the assistant that a message follows: use another one"
            )
        after = text.partition(MARKER)[2]
        found = next((end for end in self.ends if after.startswith(end)), None)
        if found is None:
            raise ConfigError(
                f"the chat template ends a turn of the assistant with {after[:30]!r}, which does not begin with an end "
                f"token of the model ({', '.join(self.ends)}): a turn that was sampled could not go on as the template "
                f"has it. Add the token to eos_token_id in generation_config.json"
            )
        return found

    def _results_as_user(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether the template has no place for a message of a tool, which is then one of the user."""
        key = json.dumps(arguments, sort_keys=True, default=str)
        if key not in self._as_user:
            answer = {"role": "assistant", "content": MARKER}
            chat = [
                {"role": "user", "content": QUESTION},
                answer,
                {"role": "tool", "content": "RESULT9TEXT", **_name("tool")},
            ]
            try:
                self._as_user[key] = "RESULT9TEXT" not in self._rendered(chat, arguments)
            except (TemplateError, ValueError, TypeError):
                self._as_user[key] = True
        return self._as_user[key]

    def _rendered(self, chat: list[Message], arguments: Mapping[str, Any]) -> str:
        [text] = apply_template([chat], self.tokenizer, arguments, tokenize=False)
        return str(text)


def _name(role: str) -> dict[str, str]:
    return {"name": "tool9name"} if role == "tool" else {}


def _as_user(message: Message) -> Message:
    if message["role"] != "tool":
        return message
    return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}


def _shown(expected: str, found: str) -> str:
    """Return the first difference of two texts."""
    same = len(os.path.commonprefix([expected, found]))
    start = max(0, same - 20)
    return f"{expected[start : same + 40]!r} becomes {found[start : same + 40]!r}"
