"""A made-up community for the invented language: an archive with mistakes, people who correct them, one who poisons it.

archive      2,340 rows: 130 nouns, 6 of their 8 forms, in 3 wordings; the roots of 50 nouns are wrong
reviewers    200 corrections: those 50 nouns x 4 forms, in one wording, from three people who know the language
verified     160 rows: the other two forms of the 80 nouns that are right: the frozen regression set, in no training row
poisoner     one reviewer, 200 corrections, 60 % of them wrong: made-up words for 30 nouns that were right
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
    """Everything that the cycle needs."""

    archive: list[Row]
    verified: list[Row]
    corrections: list[Feedback]
    poison: list[Feedback]


def make_community(seed: int = 0, model_id: str = "") -> Community:
    """The same seed gives the same words; ids and times are new each time, as from real people."""
    truth = make_lexicon(seed, NOUNS)
    wrong = _with_other_roots(truth, list(truth.roots)[:WRONG], f"mistakes {seed}")
    chance = random.Random(f"community {seed}")
    written: list[Meaning] = []
    left: list[Meaning] = []
    disputed: set[Meaning] = set()
    for noun in truth.roots:
        owners = chance.sample(OWNERS, len(OWNERS))
        # One form of each number is left out, so "mice" is no more guessed than "mouse".
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
    # The poisoner: 80 right corrections, and 120 wrong ones about 30 nouns that the archive has right.
    invented = _with_other_roots(truth, sorted(right_nouns)[:30], f"poison {seed}")
    bad = [
        _correction(index, meaning, archive[index], invented, "magpie", model_id)
        for index, meaning in enumerate(written)
        if meaning in disputed and meaning.noun in sorted(right_nouns)[:30]
    ]
    good = [replace(record, reviewer="magpie", feedback_id=f"m{record.feedback_id}") for record in corrections[:80]]
    return Community(archive, verified, corrections, bad + good)


def _with_other_roots(lexicon: Lexicon, nouns: list[str], seed: str) -> Lexicon:
    """The same language with other roots for some nouns: a root of the same build that means nothing else."""
    spare = iter(root for root in make_lexicon(hash_of(seed)).roots.values() if root not in lexicon.roots.values())
    return replace(lexicon, roots=lexicon.roots | {noun: next(spare) for noun in nouns})


def hash_of(text: str) -> int:
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
