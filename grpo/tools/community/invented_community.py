"""An invented community for the invented language: an archive with mistakes, right corrections and wrong ones.

archive      2,340 rows: 130 nouns, 6 of their 8 forms, in 3 wordings; the roots of 50 nouns are wrong
reviewers    200 corrections: those 50 nouns x 4 forms, in one wording, from three people who know the language
verified     160 rows: the other two forms of the 80 right nouns; the frozen regression set, in no training row
poison       200 corrections by one reviewer, 60 % of them wrong: invented words for 30 right nouns
"""

import random
from dataclasses import dataclass, replace
from typing import Any

from grpo.data.invented_language import OWNERS, Lexicon, Meaning, make_lexicon, meanings, row_of
from grpo.tools.community.feedback import Feedback, new_feedback

Row = dict[str, Any]
NOUNS, WRONG, FORMS, CORRECTED = 130, 50, 6, 4
REVIEWERS = ("heron", "otter", "birch")
LICENCE = "CC0-1.0"


@dataclass(frozen=True)
class Community:
    """The inputs of the cycle."""

    archive: list[Row]
    verified: list[Row]
    corrections: list[Feedback]
    poison: list[Feedback]


def make_community(seed: int = 0, model_id: str = "") -> Community:
    """Return a community. The same seed gives the same words; ids and times are new each time."""
    truth = make_lexicon(seed, NOUNS)
    wrong = _with_other_roots(truth, list(truth.roots)[:WRONG], f"mistakes {seed}")
    chance = random.Random(f"community {seed}")
    written: list[Meaning] = []
    left: list[Meaning] = []
    disputed: set[Meaning] = set()
    for noun in truth.roots:
        owners = chance.sample(OWNERS, len(OWNERS))
        # One singular and one plural form are left out, so the held-out forms are balanced.
        out = [Meaning(noun, owners[0], many=False), Meaning(noun, owners[1], many=True)]
        forms = [meaning for meaning in meanings(truth) if meaning.noun == noun and meaning not in out]
        left += out
        written += forms
        disputed |= set(chance.sample(forms, CORRECTED))
    chance.shuffle(written)
    archive = [
        row_of(index + turn * len(written), [meaning], (index + turn) % 3, wrong)
        for turn in range(3)
        for index, meaning in enumerate(written)
    ]
    right_nouns = set(list(truth.roots)[WRONG:])
    verified = [
        row_of(10_000 + index, [meaning], index % 3, truth)
        for index, meaning in enumerate(meaning for meaning in left if meaning.noun in right_nouns)
    ]
    corrections = [
        _correction(index, meaning, archive[index], truth, REVIEWERS[index % 3], model_id)
        for index, meaning in enumerate(written)
        if meaning in disputed and meaning.noun not in right_nouns
    ]
    # One reviewer: 80 right corrections, and 120 wrong ones about 30 nouns that are right in the archive.
    invented = _with_other_roots(truth, sorted(right_nouns)[:30], f"poison {seed}")
    bad = [
        _correction(index, meaning, archive[index], invented, "magpie", model_id)
        for index, meaning in enumerate(written)
        if meaning in disputed and meaning.noun in sorted(right_nouns)[:30]
    ]
    good = [replace(record, reviewer="magpie", feedback_id=f"m{record.feedback_id}") for record in corrections[:80]]
    return Community(archive, verified, corrections, bad + good)


def _with_other_roots(lexicon: Lexicon, nouns: list[str], seed: str) -> Lexicon:
    """Return the same language with other roots for some nouns: well-formed roots that mean nothing else."""
    spare = iter(root for root in make_lexicon(_number_of(seed)).roots.values() if root not in lexicon.roots.values())
    return replace(lexicon, roots=lexicon.roots | {noun: next(spare) for noun in nouns})


def _number_of(text: str) -> int:
    return random.Random(text).randrange(2**31)


def _correction(index: int, meaning: Meaning, row: Row, lexicon: Lexicon, reviewer: str, model_id: str) -> Feedback:
    return new_feedback(
        "correct",
        prompt=row["question"],
        completion=row["answer"],
        correction=row_of(index, [meaning], index % 3, lexicon)["answer"],
        pair_id=row["pair_id"],
        reviewer=reviewer,
        consent=True,
        licence=LICENCE,
        model_id=model_id,
    )
