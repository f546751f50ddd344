"""Reward for intermediate steps: the equations of a completion against those of the worked solution."""

import re
from typing import Any

from grpo.rewards.registry import register_reward, text_of

_TERM = r"-?[0-9]{1,15}(?:\.[0-9]{1,15})?"
_EQUATION = re.compile(rf"(?<![0-9.]){_TERM}(?:\ ?[-+*/×÷x]\ ?{_TERM}){{1,7}}\ ?=\ ?{_TERM}")
"""At most eight terms of bounded length: without a bound, a long sum without "=" would take quadratic time."""
_ALIKE = str.maketrans({"×": "*", "x": "*", "÷": "/", " ": None})


def equations_in(text: str) -> list[str]:
    """Return the equations of a text without spaces: "so 3 + 4 = 7, and 7-2=5" -> ["3+4=7", "7-2=5"]."""
    return [match.group().translate(_ALIKE) for match in _EQUATION.finditer(text)]


@register_reward("right_steps")
def right_steps(completions: list[Any], solution: list[Any], **_: Any) -> list[float | None]:
    """Return the share of the solution's equations that the completion begins with, in order.

    3+4=7, 7-2=5, 5+4=9 against 3+4=7, 7-2=6, 6+4=10 scores 1/3. Equations beyond the solution's number lower the share,
    so that listing more of them does not pay. None where the solution holds no equation.
    """
    return [
        _share(equations_in(text_of(completion)), equations_in(str(worked)))
        for completion, worked in zip(completions, solution, strict=True)
    ]


def _share(given: list[str], wanted: list[str]) -> float | None:
    if not wanted:
        return None
    right = 0
    for mine, theirs in zip(given, wanted, strict=False):
        if mine != theirs:
            break
        right += 1
    return right / max(len(wanted), len(given))
