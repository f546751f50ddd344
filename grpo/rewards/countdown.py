"""Reward for Countdown: reach a target with given numbers. Parses the model's arithmetic without eval."""

import ast
import json
import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from grpo.rewards.registry import register_reward, text_of
from grpo.rewards.xml_format import only_answer

MAX_CHARACTERS, MAX_DEPTH, MAX_DIGITS = 200, 20, 12
"""Limits of an expression, of its nested operations, and of one number: a hostile expression is not parsed."""

_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS = str.maketrans({"\u2212": "-", "\u00d7": "*", "\u00f7": "/"})


def evaluate_arithmetic(text: str) -> tuple[Fraction, list[int]] | None:
    """Return the exact value of an expression of whole numbers, + - * / and brackets, and its numbers; else None.

    "(25 - 5) / 3" -> (20/3, [25, 5, 3])      None for "2 ** 9", "7 // 2", "1 / 0", "__import__('os')", "9" * 13
    """
    text = text.strip().translate(_SIGNS)
    if len(text) > MAX_CHARACTERS or not _ALLOWED.fullmatch(text):
        return None
    if any(len(digits) > MAX_DIGITS for digits in re.findall(r"[0-9]+", text)):
        return None
    try:
        tree = ast.parse(text, mode="eval")
        used: list[int] = []
        return _value(tree.body, MAX_DEPTH, used), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, depth: int, used: list[int]) -> Fraction:
    """Evaluate a node. Raises ValueError for any other kind (powers, floor division, calls, names)."""
    if depth == 0:
        raise ValueError("nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, depth - 1, used)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left, depth - 1, used), _value(node.right, depth - 1, used)
        return _BINARY[type(node.op)](left, right)
    raise ValueError(f"{type(node).__name__} is not arithmetic")


@register_reward("countdown")
def countdown(completions: list[Any], nums: list[Any], target: list[Any], **_: Any) -> list[float | None]:
    """Return 1.0 where the only answer block uses each of `nums` exactly once and equals `target`, else 0.0.

    nums [25, 5, 3], target 60:    <answer>(25 - 5) * 3</answer> -> 1.0      <answer>20 * 3</answer> -> 0.0
    """
    return [
        float(_is_solution(text_of(completion), numbers, goal))
        for completion, numbers, goal in zip(completions, nums, target, strict=True)
    ]


def _is_solution(text: str, nums: Any, target: Any) -> bool:
    given = only_answer(text)
    evaluated = None if given is None else evaluate_arithmetic(given)
    if evaluated is None:
        return False
    value, used = evaluated
    numbers = json.loads(nums) if isinstance(nums, str) else nums  # a CSV file holds "[25, 5, 3]"
    return value == Fraction(str(target)) and Counter(used) == Counter(int(number) for number in numbers)
