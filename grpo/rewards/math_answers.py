"""Numeric answers: text -> exact fraction, compared with the gold answer. No floats, no evaluation."""

import re
from fractions import Fraction
from typing import Any

from grpo.rewards.registry import register_reward, text_of
from grpo.rewards.text_match import same_text
from grpo.rewards.xml_format import only_answer

MAX_DIGITS = 40
"""Longer numbers are not answers, and converting a million digits to an integer takes long."""

_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\$?(?P<inner_sign>[-+]?)"
    rf"(?:(?P<numerator>{_WHOLE})/(?P<denominator>{_WHOLE})|(?P<decimal>{_WHOLE}(?:\.[0-9]+)?|\.[0-9]+))"
    rf"\ ?%?\.?"
)
# Anything that starts like a number, well-formed or not. A sign belongs to it only where it cannot be a minus between
# two things: "24-7" is 24 and 7, "x = -7" is -7.
_NUMBER_LIKE = re.compile(r"(?:(?<![\w)])[-+\u2212])?\$?(?:(?<![\w)])[-+\u2212])?(?:(?<!\w)\.)?[0-9][0-9,./]*%?")


def parse_number(text: str) -> Fraction | None:
    """Return the value of a text that is one number and nothing else, or None.

    "1,080" -> 1080    "-3" -> -3    "3.0" -> 3    "$5" -> 5    "50%" -> 50    "3/4" -> 3/4    "18." -> 18
    None for "", "1,0,8", "nan", "²", "③", "1/0", "3 apples", and more than 40 digits.
    """
    text = text.strip()
    if len(text) > 2 * MAX_DIGITS or sum(character.isdigit() for character in text) > MAX_DIGITS:
        return None
    match = _NUMBER.fullmatch(text.replace("\u2212", "-"))
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    if match["decimal"] is not None:
        value = Fraction(match["decimal"].replace(",", ""))
    else:
        denominator = int(match["denominator"].replace(",", ""))
        if denominator == 0:
            return None
        value = Fraction(int(match["numerator"].replace(",", "")), denominator)
    return -value if "-" in (match["sign"], match["inner_sign"]) else value


def numbers_in(text: str) -> list[str]:
    """Return everything in the text that starts like a number: "from 3, to $1,080." -> ["3", "$1,080"]."""
    return [match.group().rstrip(",./") for match in _NUMBER_LIKE.finditer(text)]


def last_number(text: str) -> Fraction | None:
    """Return the value of the last number in the text, for scoring that ignores the format; None without one."""
    numbers = numbers_in(text)
    return parse_number(numbers[-1]) if numbers else None


def only_number(text: str) -> Fraction | None:
    """Return the value of the only number in the text ("18 eggs" -> 18); None for no number, several, or "5²"."""
    if any(character.isnumeric() and not character.isascii() for character in text):
        return None
    numbers = numbers_in(text)
    return parse_number(numbers[0]) if len(numbers) == 1 else None


@register_reward("accuracy")
def accuracy(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """Return 1.0 where the only number in the only answer block equals the gold answer, else 0.0.

    Several answer blocks, or several numbers in one, score 0: listing guesses must not pay. A gold answer that is not a
    number is compared as text (Unicode NFC). Without a gold answer: None.
    """
    return [
        None if gold is None else float(is_accurate(text_of(completion), str(gold)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def is_accurate(text: str, gold: str) -> bool:
    """Return whether one completion's answer equals the gold answer. See `accuracy`."""
    given = only_answer(text)
    if given is None:
        return False
    gold_value = parse_number(gold)
    return same_text(given, gold) if gold_value is None else only_number(given) == gold_value
