"""Calculator: a tool for arithmetic. The expression is parsed into a tree of numbers and operators, never executed."""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

from grpo.turns.tools import register_tool

MAX_LENGTH = 200
"""Characters of an expression."""
MAX_EXPONENT = 64
MAX_DIGITS = 300
"""Digits of an intermediate result."""
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**", ",": None, "_": None})


@register_tool("calculator")
def calculator(expression: str) -> str:
    """Compute an arithmetic expression exactly.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, for example "(17 + 5) * 3".
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"the expression has more than {MAX_LENGTH} characters")
    try:
        tree = ast.parse(expression.translate(_SIGNS).strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"'{expression}' is not an arithmetic expression") from error
    return _shown(_value(tree.body))


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            if right.denominator != 1 or abs(right) > MAX_EXPONENT:
                raise ValueError(f"exponents must be whole numbers of at most {MAX_EXPONENT}")
            return _limited(Fraction(left ** int(right)))
        if type(node.op) in _BINARY:
            return _limited(Fraction(_BINARY[type(node.op)](left, right)))
    raise ValueError("only numbers, + - * / // % ** and parentheses are allowed")


def _limited(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise ValueError(f"the result has more than {MAX_DIGITS} digits")
    return value


def _shown(value: Fraction) -> str:
    """Return a whole number exactly, and another one with up to 12 digits."""
    if value.denominator == 1:
        return str(value.numerator)
    if abs(value) > 10**15 or abs(value) < Fraction(1, 10**15):
        return f"{float(value):.12g}"
    return f"{float(value):.12f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{float(value):.12g}"
