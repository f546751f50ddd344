r"""Answers that need algebra ("\frac{1}{2}", "x^2+1", "{1, 2}"), compared with the gold answer by math-verify.

The only importer of math_verify. Exact comparison comes first: it decides most of GSM8K in microseconds. Expressions
that can keep sympy busy forever (9^{9^{9^9}}) are rejected unparsed; the worker pool stops the others at a deadline.
"""

import re
from typing import Any

from grpo.rewards.math_answers import is_accurate
from grpo.rewards.registry import one_by_one, register_reward, text_of
from grpo.rewards.text_match import same_text
from grpo.rewards.xml_format import only_answer

MAX_CHARACTERS = 300
"""Longer answers are not parsed: parsing time grows quickly."""
_TOWER = re.compile(r"(\^|\*\*)[^,;]*?(\^|\*\*)|(\^|\*\*)[\s{(]*-?[0-9]{4}|[0-9]{4,}\s*!|!\s*!|[0-9]{60}")
"""A power after a power, an exponent or a factorial of thousands, a number of 60 digits."""


@register_reward("math_verify")
@one_by_one(seconds=1.0, needs="math_verify")
def math_verify(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    r"""Return 1.0 where the only answer block, else the last \boxed{}, equals the gold answer mathematically, else 0.0.

    Without a gold answer: None. Needs math-verify: pip install -e ".[math]".
    """
    return [
        None if gold is None else float(_is_equal(text_of(completion), str(gold)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _is_equal(text: str, gold: str) -> bool:
    if is_accurate(text, gold):
        return True
    given = only_answer(text)
    given = last_boxed(text) if given is None else given
    if given is None or len(given) > MAX_CHARACTERS:
        return False
    if same_text(given, gold):
        return True
    if _TOWER.search(given):
        return False
    from math_verify import parse, verify

    # Without its own timeouts: they use signals, which fail outside the main thread and cannot stop C code.
    gold_parsed, given_parsed = (parse(f"${side}$", parsing_timeout=None) for side in (gold, given))
    return bool(verify(gold_parsed, given_parsed, timeout_seconds=None))


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...}, at most MAX_CHARACTERS long, braces balanced; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position, character in enumerate(text[start : start + MAX_CHARACTERS + 1], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:position]
    return None
