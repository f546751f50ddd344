"""Text answers, compared in Unicode NFC, so that the encoding of accents does not matter."""

import re
import unicodedata
from typing import Any

from grpo.rewards.registry import register_reward, text_of
from grpo.rewards.xml_format import only_answer


def same_text(one: str, other: str) -> bool:
    """Return whether two texts are equal in Unicode NFC and stripped: "é" equals "e" with a combining accent."""
    return unicodedata.normalize("NFC", one).strip() == unicodedata.normalize("NFC", other).strip()


_QUOTED = re.compile(r"`([^`\n]+)`|\"([^\"\n]+)\"|\u201c([^\u201c\u201d\n]+)\u201d|\u00ab([^\u00ab\u00bb\n]+)\u00bb")


def quoted_terms(text: str) -> list[str]:
    """Return the terms in `backticks` or "double", \u201ccurly\u201d or \u00abangle\u00bb quotes, NFC and stripped.

    They are in order, each once. Where a text has backticks, only they count: its other quotes are translations.
    Single quotes never do: an apostrophe is a letter in many orthographies.
    """
    found = [next(term for term in match.groups() if term) for match in _QUOTED.finditer(text)]
    ticked = [match[1] for match in _QUOTED.finditer(text) if match[1]]
    terms = (unicodedata.normalize("NFC", term).strip(" .,;:!?") for term in ticked or found)
    return list(dict.fromkeys(term for term in terms if term))


@register_reward("exact_match")
def exact_match(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """Return 1.0 where the completion, or its only answer block if it has one, is the gold answer, else 0.0.

    Without a gold answer: None.
    """
    scores: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        text = text_of(completion)
        given = only_answer(text)
        scores.append(None if gold is None else float(same_text(text if given is None else given, str(gold))))
    return scores
