"""Rewards for prose: values by hand, and attempts to exploit them."""

import unicodedata

import pytest

from grpo.data.extractors import EXTRACTORS
from grpo.rewards.prose import chrf_score, match_terms, words
from grpo.rewards.registry import REWARDS

GOLD = "ẖôṯîga"
FULL = "You would say `ẖôṯîga`. This is the word for stone as it is."


def score(name: str, completion: str, answer: str | None = GOLD, solution: str | None = FULL) -> float | None:
    chat = [[{"role": "assistant", "content": completion}]]
    return REWARDS.get(name)(completions=chat, answer=[answer], solution=[solution], prompts=[[]], completion_ids=[[]])[
        0
    ]


def total(completion: str) -> float:
    """The weights of launch/configs/invented_language.yaml."""
    return 0.6 * (score("term_match", completion) or 0) + 0.4 * (score("chrf", completion) or 0)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("One says `ẖôṯîga`, that is 'stone'.", "ẖôṯîga"),
        ('"tâga înech". This is direct.', "tâga înech"),
        ("\u201ctâga.\u201d or \u00abtâge\u00bb, \u201ctâga\u201d", "tâga\ntâge"),
        ('`tâga` means "stone"', "tâga"),
        ("it\u2019s no word, I'm 'sure'", None),
        ('`` ` "\n"', None),
        (unicodedata.normalize("NFD", "`ẖôṯîga`"), "ẖôṯîga"),
        ("`ẖ` is no `H̱`", "ẖ\nH̱"),
        ("`" * 100_000, None),
    ],
)
def test_quoted_terms(text: str, terms: str | None) -> None:
    assert EXTRACTORS["quoted_terms"](text) == terms


def test_term_match_by_hand() -> None:
    assert score("term_match", "It is `ẖôṯîga`.") == 1.0
    assert score("term_match", "It is ẖôṯîga.") == 0.0
    assert score("term_match", "`ẖôṯîga` or `tâga`") == 0.5  # a second guess costs half
    assert score("term_match", "`hotiga`") == 0.0  # the marks are letters
    assert score("term_match", "`a` `b`", answer="a\nb") == 1.0
    assert score("term_match", "`a`", answer="a\nb") == 0.5
    assert score("term_match", "`a`", answer=None) is None
    assert match_terms([], []) == 0.0


def test_an_anagram_does_not_score() -> None:
    anagram = FULL.replace(GOLD, "gaṯîẖô")
    assert score("term_match", anagram) == 0.0
    assert total(anagram) < 0.6 < total(FULL) == 1.0
    assert chrf_score("gaṯîẖô", GOLD) < 0.6
    assert score("token_f1", "gaṯîẖô", solution=GOLD) == 0.0


def test_composed_and_decomposed_are_the_same() -> None:
    for name in ("term_match", "chrf", "token_f1", "length_guard", "language_guard"):
        expected = score(name, FULL)
        assert expected == 1.0
        for form in ("NFC", "NFD"):
            for gold_form in ("NFC", "NFD"):
                assert score(
                    name,
                    unicodedata.normalize(form, FULL),
                    unicodedata.normalize(gold_form, GOLD),
                    unicodedata.normalize(gold_form, FULL),
                ) == expected, (name, form, gold_form)  # fmt: skip


def test_chrf_is_sacrebleus_and_graded() -> None:
    from sacrebleu.metrics import CHRF

    assert chrf_score("tâge", "tâga") == CHRF().sentence_score("tâge", ["tâga"]).score / 100
    assert 0 < chrf_score("ẖôṯîgo", GOLD) < 1
    assert chrf_score("hotiga", GOLD) < chrf_score("ẖôṯîgo", GOLD)  # spelled without marks is further off than one slip


def test_token_f1_by_hand() -> None:
    assert score("token_f1", "a b c", solution="a b d") == pytest.approx(2 / 3)  # 2 * 2 / (3 + 3)
    assert score("token_f1", "a a a", solution="a b c") == pytest.approx(1 / 3)  # an a counts once
    assert score("token_f1", "", solution="a") == 0.0
    assert words("`tâga`, I'd say \u2019tis -- so-so") == ["tâga", "I'd", "say", "tis", "so-so"]


def test_guards() -> None:
    assert score("length_guard", "`ẖôṯîga`") == pytest.approx(2 / 13)  # one of 13 words
    assert score("length_guard", f"{FULL} {FULL}") == pytest.approx((3 - 2) / 1.5)
    assert score("length_guard", " ".join([FULL] * 3)) == 0.0
    assert score("language_guard", "по-русски это камень") == 0.0
    assert score("language_guard", "123 !!") == 0.0
    assert score("language_guard", FULL.replace(GOLD, "hotiga")) == 0.5
    loop = "tâga tâga tâga tâga tâga tâga"  # 4 runs of three words, all the same
    assert score("language_guard", loop) == 0.25


@pytest.mark.parametrize("hostile", ["`" * 100_000, "ẖ" * 100_000, "`a` " * 25_000, "a\u0301" * 50_000, "\ud800", ""])
def test_hostile_completions_are_scored(hostile: str) -> None:
    for name in ("term_match", "chrf", "token_f1", "length_guard", "language_guard"):
        value = score(name, hostile)
        assert value is not None and 0 <= value <= 1
