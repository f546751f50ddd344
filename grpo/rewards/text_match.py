"""Answers that are text: completion -> 1.0 if it is the gold answer, however its accents are encoded."""

import unicodedata
from typing import Any

from grpo.rewards.registry import register_reward, text_of
from grpo.rewards.xml_format import only_answer


def same_text(one: str, other: str) -> bool:
    """Equal once both are in Unicode NFC and stripped: "é" as one code point equals "e" with a combining accent."""
    return unicodedata.normalize("NFC", one).strip() == unicodedata.normalize("NFC", other).strip()


@register_reward("exact_match")
def exact_match(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """1.0 where the completion is the gold answer, else 0.0; of a completion with one answer block, only that counts.

    Without a gold answer: None.
    """
    scores: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        text = text_of(completion)
        given = only_answer(text)
        scores.append(None if gold is None else float(same_text(text if given is None else given, str(gold))))
    return scores
