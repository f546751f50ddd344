"""The nouns: Prompt -> Completion -> Group.

Letters used in shapes everywhere:  P prompts · G completions per prompt · T packed tokens · N completion tokens
· S sequences · V vocabulary.

    a Prompt            "2 + 2 ="                        token_ids (5, 9, 5, 8)
    G = 2 Completions   " 4 <end>"  and  " 22 <end>"     token_ids [4, 0]       and [7, 7, 0]
    their logprobs      as they were drawn               logprobs  [-0.1, -0.0] and [-2.3, -0.4, -0.1]
    a Group             the prompt with its completions; advantages compare completions inside one Group only
"""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


@dataclass(frozen=True)
class Prompt:
    """One question as the model reads it."""

    draw: int
    """The identity: how many prompts the run had drawn before this one. Never the text, so that a prompt that
    appears twice in a step makes two groups. Sampling seeds count on it."""
    messages: str | list[Message]
    """What reward functions get as `prompts[i]`: chat messages, or plain text for a plain-text dataset."""
    token_ids: tuple[int, ...]
    """The rendered prompt, chat template applied, exactly as fed to the model."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Every other column of the row (answer, pair_id, ...), carried untouched to rewards, logs and evaluation."""


@dataclass(frozen=True)
class Completion:
    """One sampled answer. Trained on as sampled: the text is for rewards and people only."""

    token_ids: list[int]
    """The sampled ids, the end token included when there was one."""
    logprobs: list[float]
    """log p(token) under the sampling distribution, recorded as each token was drawn. Same length as token_ids."""
    ended: bool
    """True: the model drew an end token. False: cut off at max_completion_length."""
    text: str
    """token_ids decoded, special tokens left out."""


@dataclass(frozen=True)
class Group:
    """A prompt with its G completions. Lives whole on one rank, so advantages need no communication."""

    prompt: Prompt
    completions: list[Completion]


@dataclass(frozen=True)
class SamplingPlan:
    """How completions are drawn. Seeds are counted: see grpo/rollout/sampling.py."""

    num_generations: int
    max_completion_length: int
    temperature: float
    """0 = greedy."""
    seed: int
