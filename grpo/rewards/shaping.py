"""Rewards that shape length and wording: a cosine of the length, and a penalty for repetition (arXiv 2502.03373)."""

import math
from typing import Any

from grpo.rewards.math_answers import accuracy
from grpo.rewards.registry import register_reward


@register_reward("cosine_scaled")
def cosine_scaled(
    completions: list[Any],
    answer: list[Any],
    completion_ids: list[list[int]],
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    **_: Any,
) -> list[float | None]:
    """Return a reward that falls with the length of a right answer, and rises with the length of a wrong one.

        long + (short - long) * (1 + cos(pi * min(tokens / max_len, 1))) / 2

    (Demystifying Long Chain-of-Thought Reasoning, arXiv 2502.03373.) A right answer (`accuracy`) goes from
    max_value_correct to min_value_correct, a wrong one from min_value_wrong to max_value_wrong. Without a gold answer:
    None. Parameters and defaults are TRL's get_cosine_scaled_reward.

    # max_len 100, 50 tokens: right 0.75, wrong -0.75
    """
    scores: list[float | None] = []
    for right, ids in zip(accuracy(completions, answer), completion_ids, strict=True):
        short, long = (max_value_correct, min_value_correct) if right else (min_value_wrong, max_value_wrong)
        share = (1 + math.cos(math.pi * min(len(ids) / max_len, 1.0))) / 2
        scores.append(None if right is None else long + (short - long) * share)
    return scores


@register_reward("repetition_penalty")
def repetition_penalty(
    completion_ids: list[list[int]], ngram_size: int = 3, max_penalty: float = -1.0, **_: Any
) -> list[float | None]:
    """Return max_penalty * the share of n-grams of tokens that repeat an earlier one (arXiv 2502.03373, appendix C.2).

    0 for fewer than `ngram_size` tokens. Parameters and defaults are TRL's get_repetition_penalty_reward.

    # ngram_size 2: [1, 2, 3, 4] -> 0; [5, 5, 5, 5, 5] has one pair four times -> -0.75
    """
    scores: list[float | None] = []
    for ids in completion_ids:
        ngrams = [tuple(ids[start : start + ngram_size]) for start in range(len(ids) - ngram_size + 1)]
        scores.append(max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0)
    return scores
