"""Format rewards for <reasoning>...</reasoning><answer>...</answer>.

xmlcount, soft_format, strict_format, int and correctness are those of well-known GRPO demonstrations on GSM8K, quirks
included, so that their runs can be repeated. xml_format is the recommended one. Each takes time linear in the
completion's length.
"""

import re
from typing import Any

from grpo.rewards.registry import after_thinking, register_reward, text_of

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def only_answer(text: str) -> str | None:
    """Return the stripped text inside the answer block if there is exactly one after any thinking, else None."""
    text = after_thinking(text)
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    start, end = text.find("<answer>") + len("<answer>"), text.find("</answer>")
    return text[start:end].strip() if start <= end else None


def lenient_answer(text: str) -> str:
    """Return the text after the last <answer>, up to the next </answer>, stripped; without tags, the whole text."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


@register_reward("xml_format")
def xml_format(completions: list[Any], **_: Any) -> list[float | None]:
    """Return 1.0 for one reasoning block and then one answer block with only whitespace around them, else 0.0.

    Thinking (<think>...</think>) before them is allowed.
    """
    return [float(_is_xml_format(text_of(completion))) for completion in completions]


def _is_xml_format(text: str) -> bool:
    text = after_thinking(text)
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    open_reasoning, close_reasoning, open_answer, close_answer = (text.find(tag) for tag in TAGS)
    if not open_reasoning < close_reasoning < open_answer < close_answer:
        return False
    before = text[:open_reasoning]
    between = text[close_reasoning + len("</reasoning>") : open_answer]
    after = text[close_answer + len("</answer>") :]
    return not (before.strip() or between.strip() or after.strip())


@register_reward("xmlcount")
def xmlcount(completions: list[Any], **_: Any) -> list[float | None]:
    """Return 0.125 for each tag that is there exactly once on its line, minus 0.001 per character after the answer.

    Known quirk, kept: without the end of the answer, the whole text counts as "after the answer".
    """
    return [_xmlcount(text_of(completion)) for completion in completions]


def _xmlcount(text: str) -> float:
    score = 0.0
    if text.count("<reasoning>\n") == 1:
        score += 0.125
    if text.count("\n</reasoning>\n") == 1:
        score += 0.125
    if text.count("\n<answer>\n") == 1:
        score += 0.125 - 0.001 * len(text.rpartition("\n</answer>\n")[2])
    if text.count("\n</answer>") == 1:
        score += 0.125 - 0.001 * (len(text.rpartition("\n</answer>")[2]) - 1)
    return score


@register_reward("soft_format")
def soft_format(completions: list[Any], **_: Any) -> list[float | None]:
    r"""Return 0.5 where <reasoning>.*?</reasoning>\s*<answer>.*?</answer> matches at the start, else 0.

    Known quirk, kept: the dot stops at a line break, so reasoning or an answer of several lines never matches, which is
    what the "xml" system prompt asks for. Use xml_format instead.
    """
    return [0.5 * _is_soft_format(text_of(completion)) for completion in completions]


def _is_soft_format(text: str) -> bool:
    """Match the regular expression in linear time: it is quadratic on repeated "</reasoning><answer>"."""
    if not text.startswith("<reasoning>"):
        return False
    first_line_end = _line_end(text, 0)
    tried_first_line = False
    for match in re.finditer(r"</reasoning>\s*<answer>", text):
        if match.start() >= first_line_end:
            return False  # The reasoning would hold a line break.
        on_first_line = match.end() <= first_line_end
        if on_first_line and tried_first_line:
            continue  # An earlier <answer> on this line found no </answer> behind it, so a later one cannot either.
        tried_first_line = tried_first_line or on_first_line
        if text.find("</answer>", match.end(), _line_end(text, match.end())) >= 0:
            return True
    return False


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


@register_reward("strict_format")
def strict_format(completions: list[Any], **_: Any) -> list[float | None]:
    """Return 0.5 for exactly tag, one line, tag, tag, one line, tag, each on its own line, and a final line break.

    Known quirk, kept: reasoning of more than one line never matches.
    """
    # No two parts of the pattern can share a line, so there is one way to match and the time is linear.
    pattern = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$")
    return [0.5 if pattern.match(text_of(completion)) else 0.0 for completion in completions]


@register_reward("int")
def int_answer(completions: list[Any], **_: Any) -> list[float | None]:
    """Return 0.5 where the answer is digits only. Known quirk, kept: str.isdigit accepts "²" and rejects "-3"."""
    return [0.5 if lenient_answer(text_of(completion)).isdigit() else 0.0 for completion in completions]


@register_reward("correctness")
def correctness(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """Return 2.0 where the answer's text equals the gold text ("1080" is not "1,080"); accuracy compares values."""
    return [
        2.0 if lenient_answer(text_of(completion)) == gold else 0.0
        for completion, gold in zip(completions, answer, strict=True)
    ]
