"""The invented language: its letters, its split, and rows in the format of an archive."""

import json
import unicodedata
from datetime import datetime
from pathlib import Path

from grpo.config.schema import DataConfig
from grpo.data.extractors import EXTRACTORS
from grpo.data.invented_language import LETTERS, Meaning, generate_rows, make_lexicon, meanings, unmarked
from grpo.data.rows import load_examples


def test_a_word_is_beginning_root_and_ending() -> None:
    lexicon = make_lexicon(seed=0)
    root = lexicon.roots["stone"]
    assert lexicon.word(Meaning("stone")) == root
    assert lexicon.word(Meaning("stone", "my", many=True)) == lexicon.beginnings["my"] + root + lexicon.ending
    words = [lexicon.word(meaning) for meaning in meanings(lexicon)]
    assert len(set(words)) == len(words) == 130 * 4 * 2
    assert set("".join(words)) == LETTERS
    assert all(unicodedata.is_normalized("NFC", word) and unmarked(word) != word for word in words)
    assert make_lexicon(seed=1).roots != lexicon.roots


def test_rows_have_the_fields_of_an_archive() -> None:
    rows = generate_rows(seed=0)
    assert list(rows[0]) == ["question", "answer", "source_language", "generated_at", "pair_id"]
    assert [row["pair_id"] for row in rows] == list(range(len(rows)))
    assert all(datetime.fromisoformat(row["generated_at"]).tzinfo is None for row in rows[:50])
    assert rows == generate_rows(seed=0) != generate_rows(seed=1)
    assert all(EXTRACTORS["quoted_terms"](row["answer"]) for row in rows)
    assert not any(EXTRACTORS["hash"](row["answer"]) for row in rows)


def test_no_held_out_word_is_ever_read() -> None:
    term = EXTRACTORS["quoted_terms"]
    train = {term(row["answer"]) for row in generate_rows(seed=0)}
    held_out = {term(row["answer"]) for row in generate_rows(seed=0, split="held_out")}
    assert not train & held_out
    assert len(held_out) > 100


def test_any_number_of_rows() -> None:
    many = generate_rows(5000, seed=0)
    assert len({row["question"] for row in many}) == 5000
    assert len(generate_rows(7, seed=0)) == 7


def test_the_dataset_and_the_wrong_extractor(tmp_path: Path) -> None:
    import pytest

    from grpo.errors import ConfigError

    settings = DataConfig(name="invented_language", extractor="quoted_terms", system_prompt=None, eval_size=50)
    train, held_out = (load_examples(settings, part, seed=0) for part in ("train", "held_out"))
    assert len(train) > 1000 and len(held_out) == 50
    assert train[0].columns.keys() == {
        "question", "answer", "solution", "source_language", "generated_at", "pair_id"
    }  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in generate_rows(300)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"0 of 300 answers fit extractor 'hash' .*'quoted_terms' fits 300"):
        load_examples(DataConfig(name="question_answer", path=str(path)), "train", 0)
