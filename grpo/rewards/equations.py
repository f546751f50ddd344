"""Reward for intermediate steps: the equations of a completion against those of the worked solution."""

import re
from fractions import Fraction
from typing import Any

from grpo.rewards.number_text import only_number
from grpo.rewards.registry import register_reward, text_of
from grpo.rewards.xml_format import only_answer

_TERM = r"-?[0-9]{1,15}(?:\.[0-9]{1,15})?"
_EQUATION = re.compile(rf"(?<![0-9.]){_TERM}(?:\ ?[-+*/×÷x]\ ?{_TERM}){{1,7}}\ ?=\ ?{_TERM}")
"""At most eight terms of bounded length: without a bound, a long sum without "=" would take quadratic time."""
_ALIKE = str.maketrans({"×": "*", "x": "*", "÷": "/", " ": None})


def equations_in(text: str) -> list[str]:
    """Return the equations of a text without spaces: "so 3 + 4 = 7, and 7-2=5" -> ["3+4=7", "7-2=5"]."""
    return [match.group().translate(_ALIKE) for match in _EQUATION.finditer(text)]


Results = list[tuple[Fraction, Fraction]]
"""Results of the solution and of the completion, for each pair of equations."""


@register_reward("right_steps")
def right_steps(
    completions: list[Any],
    solution: list[Any],
    answer: list[Any] | None = None,
    *,
    carry_errors: bool = False,
    include_answer: bool = False,
    **_: Any,
) -> list[float | None]:
    """Return the share of the solution's equations that the completion begins with, in order.

    3+4=7, 7-2=5, 5+4=9 against 3+4=7, 7-2=6, 6+4=10 scores 1/3. With `carry_errors` it scores 2/3, as in an exam where
    errors are carried forward: an equation counts if it is the solution's, computed right, from results that the
    completion has found so far. Equations beyond the solution's number lower the share, so that listing more of them
    does not pay. With `include_answer` the number in <answer> is one more step. It counts if it is the gold answer and
    all equations are right. With `carry_errors`, it counts if it is the gold answer or the result that the completion
    has in its place. None where the solution holds no equation.
    """
    golds = answer if include_answer and answer is not None else [None] * len(completions)
    return [
        _share(text_of(completion), str(worked), None if gold is None else str(gold), carry_errors)
        for completion, worked, gold in zip(completions, solution, golds, strict=True)
    ]


def _share(text: str, solution: str, gold: str | None, carry_errors: bool) -> float | None:
    given, wanted = equations_in(text), equations_in(solution)
    if not wanted:
        return None
    right, results = _follows(given, wanted) if carry_errors else (_begins(given, wanted), [])
    steps = max(len(wanted), len(given))
    target = None if gold is None else only_number(gold)
    if target is None:
        return right / steps
    found = only_number(only_answer(text) or "")
    if found == target:
        right += carry_errors or right == steps
    elif found is not None:
        right += (target, found) in results
    return right / (steps + 1)


def _begins(given: list[str], wanted: list[str]) -> int:
    """Return the number of equations before the first one that differs."""
    right = 0
    for mine, theirs in zip(given, wanted, strict=False):
        if mine != theirs:
            break
        right += 1
    return right


def _follows(given: list[str], wanted: list[str]) -> tuple[int, Results]:
    """Return the number of equations that are right with the completion's own results in place of the solution's."""
    right = 0
    results: Results = []
    for mine, theirs in zip(given, wanted, strict=False):
        operands, signs, result = _parsed(mine)
        wanted_operands, wanted_signs, wanted_result = _parsed(theirs)
        right += mine == theirs or (
            signs == wanted_signs
            and all(
                own == value or (value, own) in results for own, value in zip(operands, wanted_operands, strict=True)
            )
            and result == _value(operands, signs)
        )
        results.append((wanted_result, result))
    return right, results


def _parsed(equation: str) -> tuple[list[Fraction], list[str], Fraction]:
    """Return the operands, the operators and the result of one of `equations_in`."""
    left, result = equation.split("=")
    first = re.match(_TERM, left)
    assert first is not None
    rest = re.findall(rf"([-+*/])({_TERM})", left[first.end() :])
    return (
        [Fraction(first.group()), *(Fraction(term) for _, term in rest)],
        [sign for sign, _ in rest],
        Fraction(result),
    )


def _value(operands: list[Fraction], signs: list[str]) -> Fraction | None:
    """Return the value, products first; None for a division by zero."""
    terms = [operands[0]]
    for sign, operand in zip(signs, operands[1:], strict=True):
        if sign == "/" and operand == 0:
            return None
        if sign in "*/":
            terms[-1] *= operand if sign == "*" else 1 / operand
        else:
            terms.append(operand if sign == "+" else -operand)
    return sum(terms, Fraction(0))
