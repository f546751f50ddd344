"""Tools and environments of the tests of `grpo check`."""

from grpo.types import Message, Prompt


def untyped(a, b):  # noqa: ANN001, ANN201
    """Add."""
    return a + b


class Guess:
    """Answers with a hint."""

    def __init__(self, hint: str = "lower"):
        self.hint = hint

    def reset(self, prompt: Prompt) -> list[Message]:
        if self.hint == "none":
            raise ValueError("no hint")
        return [{"role": "user", "content": f"guess {prompt.columns['answer']}"}]

    def step(self, completion: str) -> tuple[list[Message], float, bool]:
        return [{"role": "user", "content": self.hint}], 0.0, False
