"""Numeric answers, compared with the gold answer as exact fractions."""

from typing import Any

from grpo.rewards.number_text import only_number, parse_number, without_notation
from grpo.rewards.registry import register_reward, text_of
from grpo.rewards.text_match import same_text
from grpo.rewards.xml_format import only_answer


@register_reward("accuracy")
def accuracy(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """Return 1.0 where the only answer block is one number, with or without a unit, equal to the gold answer, else 0.0.

    Several answer blocks, or several numbers in one, score 0: listing guesses must not pay. So does a word that changes
    the number: "5 million", "not 5". A gold answer with a unit or a name ("5 cm", "x = 5") is matched by its number
    alone, too, but not with another unit; one that is not a number is compared as text (Unicode NFC). Without a gold
    answer: None.
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
    if gold_value is not None:
        return only_number(given) == gold_value
    if same_text(given, gold):
        return True
    value = only_number(gold)  # with a unit or a name, which must not be another one
    if value is not None and parse_number(given) == value:
        return True
    return (value is not None or "\\" in gold) and without_notation(given) == without_notation(gold)
