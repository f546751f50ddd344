"""Rewards for answers in prose: the right terms, similar wording, a similar length, the right script.

Each resists one way to earn reward without being right:

    term_match       a near miss, an anagram, a list of guesses: only exact terms count, and each extra one costs
    chrf             all or nothing: a nearly right word earns nearly as much, an anagram does not
    token_f1         letters that form no words earn nothing; right words in another place count
    length_guard     evasive one-word replies, and padding
    language_guard   another script, missing diacritics, repetition

Both sides are compared in Unicode NFC, so combining marks and composed letters are equal. Case is kept.
The references are the data's columns: `answer` (the extracted terms, one a line) and `solution` (the answer in full).
"""

import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

from grpo.rewards.registry import register_reward, text_of
from grpo.rewards.text_match import quoted_terms

MAX_CHARACTERS = 20_000
"""Characters of a completion that are compared: a bound on the time."""


def nfc(text: str) -> str:
    """Return the text in Unicode NFC, cut off at MAX_CHARACTERS."""
    return unicodedata.normalize("NFC", text[:MAX_CHARACTERS])


@register_reward("term_match")
def term_match(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """Return the number of right quoted terms / the larger of the numbers of gold and quoted terms.

    gold tâga:  `tâga` -> 1    `tâga` or `tâge` -> 1/2    `gâta` -> 0    tâga (not quoted) -> 0    gold None -> None
    """
    return [
        None
        if gold is None
        else match_terms(quoted_terms(text_of(completion)[:MAX_CHARACTERS]), str(gold).splitlines())
        for completion, gold in zip(completions, answer, strict=True)
    ]


def match_terms(given: list[str], gold: list[str]) -> float:
    """Return the score of one list of terms. See `term_match`."""
    wanted = {nfc(term).strip() for term in gold if term.strip()}
    right = wanted & {nfc(term) for term in given}
    return len(right) / max(len(wanted), len(given), 1)


@register_reward("chrf")
def chrf(completions: list[Any], answer: list[Any], solution: list[Any] | None = None, **_: Any) -> list[float | None]:
    """Return chrF2 (Popović 2015, by sacrebleu) of the completion against the full answer, from 0 to 1."""
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
    """Return chrF2 from 0 to 1: character n-grams up to 6, recall weighted double. Case and diacritics count."""
    return _metric().sentence_score(nfc(text), [nfc(reference)]).score / 100


@register_reward("token_f1")
def token_f1(
    completions: list[Any], answer: list[Any], solution: list[Any] | None = None, **_: Any
) -> list[float | None]:
    """Return the F1 score over whole words, each counted as often as it occurs (as in SQuAD)."""
    references = full_answers(answer, solution)
    return [
        None if reference is None else f1(words(text_of(completion)), words(reference))
        for completion, reference in zip(completions, references, strict=True)
    ]


def f1(given: list[str], wanted: list[str]) -> float:
    """Return 2PR / (P + R) = 2 * common / (given + wanted)."""
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (Counter(given) & Counter(wanted)).total() / (len(given) + len(wanted))


@register_reward("length_guard")
def length_guard(
    completions: list[Any], answer: list[Any], solution: list[Any] | None = None, **_: Any
) -> list[float | None]:
    """Return 1.0 from 0.5 to 1.5 times the full answer's words, falling to 0 at no word and at three times as many."""
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
    """Return the fraction of letters in a script of the full answer times the fraction of three-word runs that are not
    repeated more often than there. 0.0 without a letter.

    Halved where the full answer has letters with diacritics and the completion has none.
    """
    return [
        None if reference is None else language_score(text_of(completion), reference)
        for completion, reference in zip(completions, full_answers(answer, solution), strict=True)
    ]


def language_score(text: str, reference: str) -> float:
    """Return the score of one text. See `language_guard`."""
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
    """Return the first word of the letter's Unicode name: LATIN, CYRILLIC, CJK, ..."""
    return unicodedata.name(character, "UNKNOWN").partition(" ")[0]


def words(text: str) -> list[str]:
    """Return the words in NFC: runs of letters, marks, digits and apostrophes. "`tâga`, I'd" -> ["tâga", "I'd"]."""
    kept = "".join(c if c.isalnum() or unicodedata.combining(c) or c in "'\u2019-" else " " for c in nfc(text))
    return [word for word in (piece.strip("'\u2019-") for piece in kept.split()) if word]


def full_answers(answer: list[Any], solution: list[Any] | None) -> list[str | None]:
    """Return the full answers: `solution` where the extractor left something out, else `answer`."""
    longer = solution or [None] * len(answer)
    return [
        str(full) if full is not None else (None if short is None else str(short))
        for short, full in zip(answer, longer, strict=True)
    ]


def _runs(tokens: list[str]) -> list[tuple[str, ...]]:
    return list(zip(tokens, tokens[1:], tokens[2:], strict=False))


def _has_marks(text: str) -> bool:
    return any(unicodedata.combining(character) for character in unicodedata.normalize("NFD", text))
