"""Dataset invented_language: generated questions about a language that does not exist.

    question         How would you say my stones in Velûri?
    answer           In Velûri my is mî-, stone is tâga, many is -ẖûn. You would say `mîtâgaẖûn`.
    source_language  English
    generated_at     2025-10-28T00:00:07.000007
    pair_id          7

The rows have the fields and letters of an archive of a small language. Real archives belong to their speakers and may
not be published; examples and tests use this one. Words are made of seeded syllables, with letters that break careless
code (î â û ô ê ṯ ẖ). A word is prefix + root + suffix, so a model that knows the parts can form words that it has not
seen. A hash of the meaning decides what is held out: no held-out word occurs in a training row, in any wording.
"""

import hashlib
import random
import unicodedata
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from grpo.config.schema import DataConfig
from grpo.data.files import Table, table_of
from grpo.data.registry import Part, check_generated, register_dataset

LANGUAGE = "Velûri"
DATASET_NOUNS = 60
"""Nouns of the dataset: as many as the tiny model can learn in its warm-up."""
CONSONANTS = ["b", "d", "g", "h", "k", "m", "n", "p", "r", "s", "t", "w", "y", "z", "ẖ", "ṯ"]
VOWELS = ["a", "e", "i", "o", "u", "â", "ê", "î", "ô", "û"]
LETTERS = frozenset(CONSONANTS + VOWELS)

NOUNS = """
stone river bird fire tree house dog horse moon star cloud rain snow wind hill lake trout bear wolf fox goat lynx
berry root leaf seed grass flower path bridge boat canoe knife bowl spoon basket blanket drum song story dance
dream name word voice hand eye ear foot heart mother father sister brother child friend elder hunter singer teacher
winter summer morning evening night day year shadow light smoke ash salt bread meat milk honey egg feather wing
nest egret crow owl hawk duck goose frog snake ant bee spider mouse rabbit beaver otter mountain valley forest
meadow island shore sand mud ice spring well door window roof wall floor bed table rope net arrow bow shield coat
shoe hat belt ring bead shell bone horn skin thread needle
""".split()  # noqa: SIM905 (130 lines otherwise)
IRREGULAR = {
    **{"child": "children", "foot": "feet", "mouse": "mice", "goose": "geese"},
    **{"wolf": "wolves", "leaf": "leaves", "knife": "knives"},
}
OWNERS = ["", "my", "your", "our"]

QUESTIONS = [
    "How would you say {meaning} in {language}?",
    "What is the {language} term for {meaning}?",
    "Which {language} word means {meaning}?",
]
OPENINGS = ["You would say `{term}`.", "The term is `{term}`.", "It is `{term}`."]


@dataclass(frozen=True)
class Meaning:
    """Meaning of a word: a noun, its owner ("" = none), singular or plural."""

    noun: str
    owner: str = ""
    many: bool = False

    @property
    def english(self) -> str:
        """The meaning in English: "my stones"."""
        noun = plural(self.noun) if self.many else self.noun
        return f"{self.owner} {noun}".strip()


@dataclass(frozen=True)
class Lexicon:
    """The language: the root of every noun, a prefix for every owner, one suffix for the plural."""

    roots: dict[str, str]
    beginnings: dict[str, str]
    ending: str

    def word(self, meaning: Meaning) -> str:
        """Meaning("stone", "my", many=True) -> "mî" + "tâga" + "ẖûn"."""
        return self.beginnings[meaning.owner] + self.roots[meaning.noun] + (self.ending if meaning.many else "")


@register_dataset("invented_language", check=check_generated)
def invented_language(data: DataConfig, part: Part, seed: int) -> Table:
    """Return questions about words in three wordings, or a quarter of the words, held out. No download."""
    rows = generate_rows(seed=seed, split=part, lexicon=make_lexicon(seed, DATASET_NOUNS))
    return table_of("invented_language", rows)


@lru_cache
def make_lexicon(seed: int = 0, nouns: int = len(NOUNS)) -> Lexicon:
    """Return the seed's language with its first `nouns` nouns. All roots differ."""
    rng = random.Random(f"lexicon {seed}")
    taken: set[str] = set()

    def new(syllables: int, ending: str = "") -> str:
        while True:
            word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables)) + ending
            if word not in taken:
                taken.add(word)
                return word

    beginnings = {owner: new(1) if owner else "" for owner in OWNERS}
    ending = new(1, "n")
    # Every root has a letter with a diacritic, so that spelling always matters.
    roots: dict[str, str] = {}
    for noun in NOUNS[:nouns]:
        root = new(2)
        while unmarked(root) == root:
            root = new(2)
        roots[noun] = root
    return Lexicon(roots, beginnings, ending)


def meanings(lexicon: Lexicon) -> list[Meaning]:
    """Return every noun in singular and plural, without and with every owner."""
    return [Meaning(noun, owner, many) for noun in lexicon.roots for owner in OWNERS for many in (False, True)]


def is_held_out(english: str) -> bool:
    """Return whether a meaning is held out: one in four is, for every seed and wording."""
    return hashlib.sha256(english.encode()).digest()[0] < 64


def generate_rows(
    count: int | None = None,
    *,
    seed: int = 0,
    split: Part = "train",
    lexicon: Lexicon | None = None,
) -> list[dict[str, Any]]:
    """Return rows about single words, every meaning in every wording, and then rows about pairs of words.

    A held-out meaning comes in one wording only, so that held-out items are independent.

    Args:
        count: Number of rows; None = every single word.
        lexicon: Replaces the seed's language.
    """
    lexicon = lexicon or make_lexicon(seed)
    rng = random.Random(f"rows {split} {seed}")
    of_split = [m for m in meanings(lexicon) if is_held_out(m.english) == (split == "held_out")]
    if split == "train":
        single = [(m, wording) for m in of_split for wording in range(len(QUESTIONS))]
    else:
        single = [(m, rng.randrange(len(QUESTIONS))) for m in of_split]
    rng.shuffle(single)
    count = len(single) if count is None else count
    rows = [row_of(index, [m], wording, lexicon) for index, (m, wording) in enumerate(single[:count])]
    seen: set[tuple[Meaning, Meaning, int]] = set()
    while len(rows) < count:
        first, second = rng.sample(of_split, 2)
        wording = rng.randrange(len(QUESTIONS))
        if (first, second, wording) not in seen:
            seen.add((first, second, wording))
            rows.append(row_of(len(rows), [first, second], wording, lexicon))
    return rows


def row_of(pair_id: int, parts: list[Meaning], wording: int, lexicon: Lexicon) -> dict[str, Any]:
    """Return the row that asks for these words in wording number `wording`."""
    english = " and ".join(part.english for part in parts)
    terms = " ".join(lexicon.word(part) for part in parts)
    explained = " ".join(explanation(part, lexicon) for part in parts)
    stamp = datetime(2025, 10, 28) + timedelta(seconds=pair_id, microseconds=pair_id % 1_000_000)
    return {
        "question": QUESTIONS[wording].format(meaning=english, language=LANGUAGE),
        "answer": f"{explained} {OPENINGS[wording].format(term=terms)}",
        "source_language": "English",
        "generated_at": stamp.isoformat(timespec="microseconds"),
        "pair_id": pair_id,
    }


def explanation(meaning: Meaning, lexicon: Lexicon) -> str:
    """Return the sentence that explains the parts of the word, in their order."""
    parts = [f"{meaning.noun} is {lexicon.roots[meaning.noun]}"]
    if meaning.owner:
        parts.insert(0, f"{meaning.owner} is {lexicon.beginnings[meaning.owner]}-")
    if meaning.many:
        parts.append(f"many is -{lexicon.ending}")
    return f"In {LANGUAGE} {', '.join(parts)}."


def plural(noun: str) -> str:
    """Return the English plural."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")


def unmarked(text: str) -> str:
    """Return the text without diacritics: "tâgaẖ" -> "tagah"."""
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
