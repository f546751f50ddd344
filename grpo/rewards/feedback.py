"""What people said, as a reward: a reply that was accepted earns, a reply that was turned down costs.

accepted ["It is `tâge`."]  disallowed ["It is `tâga`."]
"It is `tâge`."  -> 1      "One says `tâge`." -> 1 (the same terms)      "It is  `tâga`." -> -1 (nearly the same text)
anything else    -> 0      a question without feedback -> None (does not apply)
"""

from typing import Any

from grpo.rewards.prose import chrf_score, nfc
from grpo.rewards.registry import register_reward, text_of
from grpo.rewards.text_match import quoted_terms

NEAR = 0.9
"""chrF from which two texts count as the same reply."""


@register_reward("feedback")
def feedback(
    completions: list[Any], accepted: list[Any] | None = None, disallowed: list[Any] | None = None, **_: Any
) -> list[float | None]:
    """1.0, 0.0, -1.0 or None; the columns are those of a merged version of the data. Acceptance is looked at first."""
    nothing: list[Any] = [None] * len(completions)
    return [
        score(text_of(completion), list(good or []), list(bad or []))
        for completion, good, bad in zip(completions, accepted or nothing, disallowed or nothing, strict=True)
    ]


def score(text: str, accepted: list[str], disallowed: list[str]) -> float | None:
    if not accepted and not disallowed:
        return None
    terms = set(quoted_terms(text))
    for reply in accepted:
        if nfc(text).strip() == nfc(reply).strip() or (terms and terms == set(quoted_terms(reply))):
            return 1.0
    for reply in disallowed:
        if chrf_score(text, reply) > NEAR or (terms and terms == set(quoted_terms(reply))):
            return -1.0
    return 0.0
