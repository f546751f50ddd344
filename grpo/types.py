"""Data types: Prompt -> Completion -> Group.

Letters in shapes:  P prompts · G completions per prompt · T packed tokens · N completion tokens
· S sequences · V vocabulary.

    a Prompt            "2 + 2 ="                        token_ids (5, 9, 5, 8)
    G = 2 Completions   " 4 <end>"  and  " 22 <end>"     token_ids [4, 0]       and [7, 7, 0]
    their logprobs      as they were drawn               logprobs  [-0.1, -0.0] and [-2.3, -0.4, -0.1]
    a Group             the prompt with its completions; advantages compare completions within one Group only
"""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}, and whatever else the chat template reads
(tool_calls, name, ...)."""


def question_of(messages: str | list[Message]) -> str:
    """Return the question of a prompt: the text, or the last message of the user."""
    if isinstance(messages, str):
        return messages
    asked = [one["content"] for one in messages if one["role"] == "user"] or [one["content"] for one in messages]
    return str(asked[-1]) if asked else ""


def prefill_of(messages: str | list[Message]) -> str:
    """Return the beginning of the answer that a prompt gives: the content of a last message of the assistant."""
    if isinstance(messages, str) or not messages or messages[-1]["role"] != "assistant":
        return ""
    return str(messages[-1]["content"])


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model reads it."""

    draw: int
    """Identity: the number of prompts drawn before this one in the run. Never the text, so that a prompt that appears
    twice in a step makes two groups. Sampling seeds depend on it."""
    messages: str | list[Message]
    """Passed to reward functions as `prompts[i]`: chat messages, or plain text for a plain-text dataset."""
    token_ids: tuple[int, ...]
    """The rendered prompt, chat template applied, exactly as the model gets it."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Every other column of the row (answer, pair_id, ...), passed unchanged to rewards, logs and evaluation."""


@dataclass(frozen=True)
class Completion:
    """One sampled completion. Training uses the token ids; the text is for rewards and logs only."""

    token_ids: list[int]
    """The ids after the prompt: those that were sampled, including end tokens, and those that were given."""
    logprobs: list[float]
    """log p(token) under the sampling distribution, recorded at sampling. One for each of token_ids; 0 where given."""
    ended: bool
    """True: the model drew an end token. False: cut off at max_completion_length."""
    text: str
    """The (last) turn decoded, without end, padding and bos tokens. Other special tokens stay: <answer> may be one."""
    given: list[list[int]] = field(default_factory=list)
    """[start, end) of the token_ids between turns (tool results, ...): context, not sampled, never in the loss."""
    turns: dict[str, Any] = field(default_factory=dict)
    """With tools or an environment: messages, reward, ... (grpo/rollout/dialogue.py). Plain values."""

    @property
    def sampled(self) -> list[int]:
        """Indices of the token_ids that were sampled."""
        if not self.given:
            return list(range(len(self.token_ids)))
        return [n for n in range(len(self.token_ids)) if not any(start <= n < end for start, end in self.given)]


@dataclass(frozen=True)
class Group:
    """A prompt with its G completions. A group lives on one rank, so that its advantages need no communication."""

    prompt: Prompt
    completions: list[Completion]


@dataclass(frozen=True)
class SamplingPlan:
    """Sampling parameters. Seeds are counted: see grpo/rollout/sampling.py."""

    num_generations: int
    max_completion_length: int
    temperature: float
    """0 = greedy."""
    seed: int
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def is_restricted(self) -> bool:
        """Tokens are drawn from another distribution than the policy's: for evaluation only."""
        return (self.top_p, self.top_k, self.min_p, self.repetition_penalty) != (1.0, 0, 0.0, 1.0)
