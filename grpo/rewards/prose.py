"""Rewards for answers in prose: is the term right, is the wording near, is it of the right length, in the right letters?

Each resists one way of being paid without being right:

    term_match       a near miss, an anagram, a list of guesses: only the very terms count, and each extra one costs
    chrf             all or nothing: a word that is nearly right earns nearly as much, its letters in another order do not
    token_f1         right words in the wrong place are fine; letters that are no words earn nothing
    length_guard     one-word replies that dodge, and padding
    language_guard   drifting into another script, spelling without the marks, and going round in circles

Both sides are compared in Unicode NFC, so a text that was typed with combining marks equals one that was not; case stays.
The references are the data's columns: `answer` (the extracted terms, one a line) and `solution` (the answer in full).
"""

import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

from grpo.rewards.registry import register_reward, text_of
from grpo.rewards.text_match import quoted_terms

LONGEST = 20_000
"""Characters of a completion that are looked at: far more than any answer, and a bound on the time."""


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text[:LONGEST])


@register_reward("term_match")
def term_match(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """Right quoted terms / terms there should be, or are, whichever is more; 1.0 for exactly the gold ones.

    gold tâga:  `tâga` -> 1    `tâga` or `tâge` -> 1/2    `gâta` -> 0    tâga (not quoted) -> 0    gold None -> None
    """
    return [
        None if gold is None else match_terms(quoted_terms(text_of(completion)[:LONGEST]), str(gold).splitlines())
        for completion, gold in zip(completions, answer, strict=True)
    ]


def match_terms(given: list[str], gold: list[str]) -> float:
    wanted = {nfc(term).strip() for term in gold if term.strip()}
    right = wanted & {nfc(term) for term in given}
    return len(right) / max(len(wanted), len(given), 1)


@register_reward("chrf")
def chrf(completions: list[Any], answer: list[Any], solution: list[Any] | None = None, **_: Any) -> list[float | None]:
    """chrF2 (Popović 2015, by sacrebleu) of the completion against the full answer, from 0 to 1."""
    references = full_answers(answer, solution)
    return [
        None if reference is None else chrf_score(text_of(completion), reference)
        for completion, reference in zip(completions, references, strict=True)
    ]


@lru_cache(maxsize=1)
def _metric() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def chrf_score(text: str, reference: str) -> float:
    """From 0 to 1; character n-grams up to 6, recall counted double. Case and marks count."""
    return _metric().sentence_score(nfc(text), [nfc(reference)]).score / 100


@register_reward("token_f1")
def token_f1(
    completions: list[Any], answer: list[Any], solution: list[Any] | None = None, **_: Any
) -> list[float | None]:
    """Harmonic mean of precision and recall over whole words, each counted as often as it occurs (as in SQuAD)."""
    references = full_answers(answer, solution)
    return [
        None if reference is None else f1(words(text_of(completion)), words(reference))
        for completion, reference in zip(completions, references, strict=True)
    ]


def f1(given: list[str], wanted: list[str]) -> float:
    """2PR / (P + R) = 2 * common / (given + wanted)."""
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (Counter(given) & Counter(wanted)).total() / (len(given) + len(wanted))


@register_reward("length_guard")
def length_guard(
    completions: list[Any], answer: list[Any], solution: list[Any] | None = None, **_: Any
) -> list[float | None]:
    """1.0 from half to one and a half times the full answer's words; falls to 0 at no word, and at three times as many."""
    scores: list[float | None] = []
    for completion, reference in zip(completions, full_answers(answer, solution), strict=True):
        if reference is None:
            scores.append(None)
            continue
        ratio = len(words(text_of(completion))) / max(1, len(words(reference)))
        scores.append(min(1.0, 2 * ratio, max(0.0, (3 - ratio) / 1.5)))
    return scores


@register_reward("language_guard")
def language_guard(
    completions: list[Any], answer: list[Any], solution: list[Any] | None = None, **_: Any
) -> list[float | None]:
    """Share of the completion's letters that belong to a script of the full answer, times the share of its three-word
    runs that are not repeated more often than there. 0.0 without a letter.

    Where the gold terms hold marked letters and the completion holds none at all, half: the marks were left out.
    """
    return [
        None if reference is None else language_score(text_of(completion), reference)
        for completion, reference in zip(completions, full_answers(answer, solution), strict=True)
    ]


def language_score(text: str, reference: str) -> float:
    text, reference = nfc(text), nfc(reference)
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return 0.0
    allowed = {script(character) for character in reference if character.isalpha()}
    in_script = sum(script(character) in allowed for character in letters) / len(letters)
    runs, known = Counter(_runs(words(text))), Counter(_runs(words(reference)))
    allowed_runs = sum(min(count, max(1, known[run])) for run, count in runs.items())
    fresh = allowed_runs / runs.total() if runs else 1.0
    marks = 0.5 if _has_marks(reference) and not _has_marks(text) else 1.0
    return in_script * fresh * marks


@lru_cache(maxsize=4096)
def script(character: str) -> str:
    """The first word of the letter's Unicode name: LATIN, CYRILLIC, CJK, ..."""
    return unicodedata.name(character, "UNKNOWN").partition(" ")[0]


def words(text: str) -> list[str]:
    """Runs of letters, marks, digits and apostrophes, in NFC, case kept: "`tâga`, I'd say" -> ["tâga", "I'd", "say"]."""
    kept = "".join(c if c.isalnum() or unicodedata.combining(c) or c in "'\u2019-" else " " for c in nfc(text))
    return [word for word in (piece.strip("'\u2019-") for piece in kept.split()) if word]


def full_answers(answer: list[Any], solution: list[Any] | None) -> list[str | None]:
    """The answer column in full: `solution` where extraction left something out, else `answer`."""
    longer = solution or [None] * len(answer)
    return [
        str(full) if full is not None else (None if short is None else str(short))
        for short, full in zip(answer, longer, strict=True)
    ]


def _runs(tokens: list[str]) -> list[tuple[str, ...]]:
    return list(zip(tokens, tokens[1:], tokens[2:], strict=False))


def _has_marks(text: str) -> bool:
    return any(unicodedata.combining(character) for character in unicodedata.normalize("NFD", text))
