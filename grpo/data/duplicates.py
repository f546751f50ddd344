"""Questions that are repeated in the training prompts, or that are both trained on and held out."""

import unicodedata
from collections.abc import Sequence

from grpo.types import Prompt, question_of


def repeated_prompts(prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[str]:
    """Return warnings about repeated questions. They are compared in Unicode NFC, with spaces collapsed."""
    asked = [_question(prompt) for prompt in prompts]
    trained, warnings = set(asked), []
    if repeated := len(asked) - len(trained):
        warnings.append(f"{repeated} of {len(asked)} training prompts repeat another one")
    if known := sum(_question(prompt) in trained for prompt in held_out):
        warnings.append(
            f"{known} of {len(held_out)} held-out questions are among the training prompts, so eval/accuracy "
            f"includes memorised answers. Set another data.eval_path"
        )
    return warnings


def _question(prompt: Prompt) -> str:
    return " ".join(unicodedata.normalize("NFC", question_of(prompt.messages)).split())
