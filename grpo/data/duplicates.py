"""Questions that are repeated in the training rows, or that are both trained on and held out."""

import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from grpo.types import Message, question_of


class Asked(Protocol):
    """A `Prompt`, or an `Example` that is not tokenised yet."""

    @property
    def messages(self) -> str | list[Message]:
        """Chat messages or plain text."""


@dataclass(frozen=True)
class Repeats:
    """Counts of questions. They are compared in Unicode NFC, with spaces collapsed."""

    trained: int
    repeated: int
    """Training rows whose question another row before them has."""
    held_out: int
    known: int
    """Held-out rows whose question is trained on."""

    def warnings(self) -> list[str]:
        """Return one line for each count that is not 0."""
        lines = []
        if self.repeated:
            lines.append(f"{self.repeated} of {self.trained} training prompts repeat another one")
        if self.known:
            lines.append(
                f"{self.known} of {self.held_out} held-out questions are among the training prompts, so eval/accuracy "
                f"includes memorised answers. Set another data.eval_path"
            )
        return lines


def count_repeats(train: Collection[Asked], held_out: Collection[Asked]) -> Repeats:
    """Count questions that are repeated in the training rows, and held-out ones that are among them."""
    trained = {_question(row) for row in train}
    known = sum(_question(row) in trained for row in held_out)
    return Repeats(len(train), len(train) - len(trained), len(held_out), known)


def _question(row: Asked) -> str:
    return " ".join(unicodedata.normalize("NFC", question_of(row.messages)).split())
