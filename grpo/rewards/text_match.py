"""Answers that are text: completion -> 1.0 if it is the gold answer, however its accents are encoded."""

import re
import unicodedata
from typing import Any

from grpo.rewards.registry import register_reward, text_of
from grpo.rewards.xml_format import only_answer


def same_text(one: str, other: str) -> bool:
    """Equal once both are in Unicode NFC and stripped: "é" as one code point equals "e" with a combining accent."""
    return unicodedata.normalize("NFC", one).strip() == unicodedata.normalize("NFC", other).strip()


_QUOTED = re.compile(r"`([^`\n]+)`|\"([^\"\n]+)\"|\u201c([^\u201c\u201d\n]+)\u201d|\u00ab([^\u00ab\u00bb\n]+)\u00bb")


def quoted_terms(text: str) -> list[str]:
    """The terms in `backticks`, "double", \u201ccurly\u201d or \u00abangle\u00bb quotes, in order, each once, NFC and stripped.

    Where a text has backticks, only they count: its other quotes are translations. Single quotes never do: an
    apostrophe is a letter in many orthographies.
    """
    found = [next(term for term in match.groups() if term) for match in _QUOTED.finditer(text)]
    ticked = [match[1] for match in _QUOTED.finditer(text) if match[1]]
    terms = (unicodedata.normalize("NFC", term).strip(" .,;:!?") for term in ticked or found)
    return list(dict.fromkeys(term for term in terms if term))


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
