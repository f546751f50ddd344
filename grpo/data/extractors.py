r"""Extractors: text of the answer column -> the gold answer inside it, or None without one.

hash     "9 * 2 = 18\n#### 1,080"           -> "1080"
xml      "...<answer>\n18\n</answer>"      -> "18"
boxed    "so it is \boxed{\frac{1}{2}}"    -> "\frac{1}{2}"
quoted_terms   'One says `tâga`, or "tâge".' -> "tâga\ntâge"   (one term per line)
number   "he pays 18 dollars."              -> "18"
plain    " Paris "                          -> "Paris"

Answers are returned in Unicode NFC, and never case-folded: "ẖ" has no capital, so folding would split it.
"""

import unicodedata
from collections.abc import Callable

from grpo.rewards.number_text import numbers_in, tidy_number
from grpo.rewards.text_match import quoted_terms
from grpo.rewards.xml_format import lenient_answer


def extract_hash(text: str) -> str | None:
    """Return the rest of the line after the last ####."""
    _, marker, rest = text.rpartition("####")
    return _tidy(rest.strip().partition("\n")[0]) if marker else None


def extract_xml(text: str) -> str | None:
    """Return the text inside the last <answer>...</answer>."""
    start = text.rfind("<answer>")
    return _tidy(lenient_answer(text)) if start >= 0 and text.find("</answer>", start) >= 0 else None


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...}, braces balanced, in linear time."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # \{ and \} are printed characters, not braces
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return _tidy(text[start:position])
        position += 1
    return None


def extract_quoted_terms(text: str) -> str | None:
    """Return all quoted terms, one per line."""
    return "\n".join(quoted_terms(text)) or None


def extract_number(text: str) -> str | None:
    """Return the last number in the text, whole. None where it is part of another one: "5 million", "2nd", "5-10"."""
    numbers = [text] if tidy_number(text) is not None else numbers_in(text)
    return tidy_number(numbers[-1]) if numbers else None


def extract_plain(text: str) -> str | None:
    """Return the whole text, stripped."""
    return unicodedata.normalize("NFC", text).strip() or None


def _tidy(answer: str) -> str | None:
    """Strip an answer. A number also loses currency and separators, so that rewards that compare text can match it."""
    answer = unicodedata.normalize("NFC", answer).strip()
    return tidy_number(answer) or answer or None


# From the most to the least specific: an error suggests the first of those that fit most rows.
EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "hash": extract_hash,
    "xml": extract_xml,
    "boxed": extract_boxed,
    "quoted_terms": extract_quoted_terms,
    "number": extract_number,
    "plain": extract_plain,
}
LOOKS_LIKE = {
    "hash": "#### N",
    "xml": "<answer>N</answer>",
    "boxed": "\\boxed{N}",
    "quoted_terms": "a `term` in backticks or double quotes",
    "number": "any text with a number",
    "plain": "any text",
}


def extraction_rates(texts: list[str]) -> dict[str, int]:
    """Return the number of answer texts in which each extractor finds an answer."""
    return {name: sum(extract(text) is not None for text in texts) for name, extract in EXTRACTORS.items()}
