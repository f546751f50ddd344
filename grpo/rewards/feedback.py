"""Reward from human feedback: accepted replies earn 1, rejected replies cost 1.

accepted ["It is `tâge`."]  disallowed ["It is `tâga`."]
"It is `tâge`."  -> 1      "One says `tâge`." -> 1 (the same terms)      "It is  `tâga`." -> -1 (nearly the same text)
anything else    -> 0      a question without feedback -> None (does not apply)
"""

from typing import Any

from grpo.rewards.prose import chrf_score, nfc
from grpo.rewards.registry import register_reward, text_of
from grpo.rewards.text_match import quoted_terms

SAME_REPLY_CHRF = 0.9
"""Two texts with a chrF above this count as the same reply."""


@register_reward("feedback")
def feedback(
    completions: list[Any], accepted: list[Any] | None = None, disallowed: list[Any] | None = None, **_: Any
) -> list[float | None]:
    """Return 1.0, 0.0, -1.0 or None. The columns are those of a merged version; `accepted` is checked first."""
    nothing: list[Any] = [None] * len(completions)
    return [
        score(text_of(completion), list(good or []), list(bad or []))
        for completion, good, bad in zip(completions, accepted or nothing, disallowed or nothing, strict=True)
    ]


def score(text: str, accepted: list[str], disallowed: list[str]) -> float | None:
    """Return the reward of one reply; None without feedback on the question."""
    if not accepted and not disallowed:
        return None
    terms = set(quoted_terms(text))
    for reply in accepted:
        if nfc(text).strip() == nfc(reply).strip() or (terms and terms == set(quoted_terms(reply))):
            return 1.0
    for reply in disallowed:
        if chrf_score(text, reply) > SAME_REPLY_CHRF or (terms and terms == set(quoted_terms(reply))):
            return -1.0
    return 0.0
