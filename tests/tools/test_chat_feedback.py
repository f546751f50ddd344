"""Judgements given in the chat become feedback records."""

from collections.abc import Callable

import pytest

from grpo.tools.chat import ask_judgement
from grpo.tools.community.feedback import Feedback

ABOUT = {"reviewer": "heron", "consent": True, "licence": "CC0-1.0", "model": "run/final", "checkpoint_sha": "9b1c"}


def typed(*lines: str) -> Callable[[str], str]:
    waiting = iter(lines)
    return lambda what: next(waiting)


@pytest.mark.parametrize(
    ("lines", "verdict", "correction", "rating"),
    [
        (["a", "5", ""], "accept", None, 5),
        (["r", "", "no such word"], "reject", None, None),
        (["c", "It is `tâge`.", "2", ""], "correct", "It is `tâge`.", 2),
        (["c", " ", "7", ""], "reject", None, None),  # nothing to correct it to; 7 is no rating
    ],
)
def test_a_verdict(lines: list[str], verdict: str, correction: str | None, rating: int | None) -> None:
    said = ask_judgement(typed(*lines), "What is stone?", "It is `tâga`.", ABOUT)
    assert isinstance(said, Feedback)
    assert (said.verdict, said.correction, said.rating) == (verdict, correction, rating)
    assert (said.reviewer, said.consent, said.licence, said.model_id, said.checkpoint_sha) == tuple(ABOUT.values())
    assert (said.prompt, said.completion) == ("What is stone?", "It is `tâga`.")


def test_nothing_said() -> None:
    assert ask_judgement(typed(""), "q", "a", ABOUT) is None
