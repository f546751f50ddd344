"""Data: rows from files to examples, errors with file and line, and the real GSM8K if it is available."""

import bz2
import dataclasses
import gzip
import json
import lzma
import os
from contextlib import nullcontext
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from grpo.config.schema import DataConfig
from grpo.data.extractors import EXTRACTORS
from grpo.data.files import BadRows, table_of
from grpo.data.hub import is_hub_name
from grpo.data.prompts import SYSTEM_PROMPT, shown_examples, worked_examples
from grpo.data.registry import DATASETS
from grpo.data.rows import Example, example_of, load_examples, load_rows
from grpo.data.streaming import peek
from grpo.errors import ConfigError
from grpo.rewards.number_text import parse_number

ROWS = [
    {"question": "Tom has 3 bags of 360 beans. How many beans?", "answer": "3 * 360 = <<3*360=1080>>1080\n#### 1,080"},
    {"question": "Ann owes $5 and pays $8. What is left?", "answer": "5 - 8 = -3\n#### -3"},
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path: str, part: Any = "train", **settings: Any) -> list[Example]:
    settings.setdefault("name", "question_answer")
    return load_examples(DataConfig(path=path, **settings), part, seed=0)


NUMBERS = {
    "1.5e-06": "1.5e-06",
    "10 000": "10000",
    r"10,\!000": "10000",
    r"10\,000": "10000",
    "10{,}000": "10000",
    "3 1/2": "3 1/2",
    "it takes 3 1/2 hours": "3 1/2",
    "x = \u2212 7": "-7",
    "5 \u2212 8 = \u22123": "-3",
    "it costs 10 000 euros.": "10000",
    "it needs 12 300 g of flour": "12300",
    "10\u00a0000 Fr.": "10000",
    "so 1.5 \u00d7 10^6 m": "1.5 \u00d7 10^6",
    "it weighs 5kg": "5",
    "he gets 300 cents": "300",
    "that is $7200/year": "7200",
    "the 600-meter race": "600",
    "so 24-7 is 17": "17",
    r"x = \frac{3}{4}.": "3/4",
    "50 %": "50%",
    "\uff11\uff12": "12",
    "**18**": "18",
    "2 + 2 = 4!": "4",
}
NO_NUMBERS = ["5 million", "the 2nd", "5-10 days", "10:30", "12/05/2024", "1.2.3", "3,14", "3.000,50", "5k", "10^6"]
NO_NUMBERS += [
    "5\u00b2",
    "H2O",
    "5 dozen",
    "minus 7",
    "not 7",
    r"3\sqrt{2}",
    r"2\pi",
    "page - 7",
    "1 2 3",
    "3 and a half",
    "it holds 12 200-kilobyte videos",
    "that is 12 300 gram bags",
    "5 \u00b1 1",
    r"x = 5 \pm 0.5",
    "2.5 \u00d7 10 ^ -3",
]


@pytest.mark.parametrize(
    ("extractor", "text", "answer"),
    [
        ("hash", "9 * 2\n#### 1,080", "1080"),
        ("hash", "#### 1\n#### $2.50 \nmore", "2.50"),
        ("hash", "####  ", None),
        ("hash", "18", None),
        ("xml", "<answer>1</answer><answer>\n 1,800\n</answer>", "1800"),
        ("xml", "<answer>18", None),
        ("xml", "<answer> </answer>", None),
        ("boxed", r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} then \boxed{\{2\}}", r"\{2\}"),
        ("boxed", r"\boxed{1", None),
        ("boxed", "\\boxed{" * 20_000, None),
        ("number", "he pays 3 and then $1,018.", "1018"),
        ("number", "none", None),
        *(("number", text, answer) for text, answer in NUMBERS.items()),
        *(("number", text, None) for text in NO_NUMBERS),
        ("boxed", r"\boxed{10{,}000}", "10000"),
        ("boxed", r"\boxed{-\dfrac{1}{2}}", r"-\dfrac{1}{2}"),
        ("hash", "#### 10\u202f000", "10000"),
        ("hash", "#### \u22127", "-7"),
        ("xml", "<answer>$ 1,080</answer>", "1080"),
        ("plain", " Paris \n", "Paris"),
        ("plain", "  ", None),
    ],
)
def test_extractors(extractor: str, text: str, answer: str | None) -> None:
    assert EXTRACTORS[extractor](text) == answer


def test_gsm8k_rows_become_examples(tmp_path: Path) -> None:
    examples = load(write(tmp_path / "train.jsonl", ROWS), name="gsm8k")
    assert examples[0] == Example(
        [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": ROWS[0]["question"]}],
        {"question": ROWS[0]["question"], "answer": "1080", "solution": ROWS[0]["answer"]},
    )
    assert examples[1].columns["answer"] == "-3"


def test_held_out_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ROWS)
    eval_path = write(tmp_path / "test.jsonl", ROWS)
    for name in ("gsm8k", "question_answer"):
        assert load(path, "held_out", name=name) == []
        assert len(load(path, "held_out", name=name, eval_path=eval_path)) == 2
        assert len(load(path, "held_out", name=name, eval_path=eval_path, eval_size=None)) == 2
        limited = load(path, "held_out", name=name, eval_path=eval_path, eval_size=1)
        assert [example.columns["answer"] for example in limited] == ["1080"]


def test_system_prompt_and_worked_example(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ROWS)
    roles = lambda **settings: [message["role"] for message in load(path, **settings)[0].messages]  # noqa: E731
    assert roles() == ["system", "user"]
    assert roles(system_prompt=None) == ["user"]
    assert roles(one_shot=True) == ["system", "user", "assistant", "user"]
    assert load(path, system_prompt="Be brief.")[0].messages[0] == {"role": "system", "content": "Be brief."}
    shown = load(path, one_shot=True)[0].messages[2]["content"]
    assert shown.startswith("<reasoning>\n") and shown.endswith("<answer>\n19\n</answer>\n")
    assert "<answer>" not in load(path, one_shot=True, system_prompt=None)[0].messages[1]["content"]


SHOWN = {"question": "Nina has 2 hats and buys 3. How many?", "answer": "2+3=5\n#### 5"}


def test_worked_examples_are_earlier_turns(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ROWS)
    turns = [
        {"role": "user", "content": SHOWN["question"]},
        {"role": "assistant", "content": "<reasoning>\n2+3=5\n</reasoning>\n<answer>\n5\n</answer>\n"},
    ]
    [first, _] = load(path, examples=[SHOWN])
    assert first.messages[1:-1] == turns and first.messages[-1] == {"role": "user", "content": ROWS[0]["question"]}
    [from_file, _] = load(path, examples=write(tmp_path / "shown.jsonl", [SHOWN]))
    assert from_file == first
    assert len(load(path, examples=[SHOWN], one_shot=True)[0].messages) == 6
    [plain, _] = load(path, examples=[SHOWN], system_prompt=None)
    assert [message["content"] for message in plain.messages[:-1]] == [SHOWN["question"], SHOWN["answer"]]
    assert load(path, examples=[]) == load(path)


@pytest.mark.parametrize(
    ("row", "settings", "completion"),
    [
        ({"answer": "5", "reasoning": "Two and three."}, {"extractor": "number"}, "Two and three.|5"),
        ({"answer": "2 + 3 are 5"}, {"extractor": "number"}, "2 + 3 are 5|5"),
        ({"answer": "<reasoning>a</reasoning><answer>5</answer>"}, {"extractor": "xml"},
         "<reasoning>a</reasoning><answer>5</answer>\n"),
        ({"completion": " as it is "}, {}, " as it is "),
        ({"answer": "say `tâga`", "reasoning": "."}, {"extractor": "quoted_terms", "system_prompt": "Be brief"},
         ".\nsay `tâga`"),
    ],
)  # fmt: skip
def test_the_completion_of_a_worked_example(row: dict[str, str], settings: dict[str, Any], completion: str) -> None:
    if "|" in completion:
        reasoning, _, answer = completion.partition("|")
        completion = f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>\n"
    data = DataConfig(question="ask", examples=[{"ask": "q", **row}], **settings)
    assert worked_examples(data) == [("q", completion)]
    recorded = dataclasses.replace(data, examples=shown_examples(data), extractor="hash", system_prompt=None)
    assert worked_examples(recorded) == [("q", completion)]


def test_a_row_that_is_a_worked_example_is_neither_trained_on_nor_evaluated(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [*ROWS, SHOWN])
    shown = write(tmp_path / "shown.jsonl", [SHOWN])
    assert [e.columns["question"] for e in load(path, examples=shown)] == [row["question"] for row in ROWS]
    assert len(load(path, "held_out", eval_path=path, examples=shown)) == 2
    data = DataConfig(name="question_answer", path=path, examples=shown, streaming=True)
    assert [e.columns["question"] for e in peek(data, BadRows())] == [row["question"] for row in ROWS]
    assert example_of(SHOWN, "here", data, BadRows()) is None


def test_mapped_columns_and_untouched_ones(tmp_path: Path) -> None:
    row = {"ask": "Capital of France?", "gold": "Paris", "pair_id": 7, "tags": ["a"]}
    path = write(tmp_path / "a.jsonl", [row])
    example = load(path, question="ask", answer="gold", extractor="plain")[0]
    assert example.columns == {
        "question": "Capital of France?", "answer": "Paris", "pair_id": 7, "tags": ["a"]
    }  # fmt: skip


def test_the_identity_of_a_row_is_carried_under_its_own_name(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "id": 7, "made": "2025-10-28T18:31:06.592517"}
    path = write(tmp_path / "a.jsonl", [row])
    example = load(path, extractor="plain", pair_id="id", generated_at="made")[0]
    assert example.columns == {
        "question": "q", "answer": "a", "pair_id": 7, "generated_at": "2025-10-28T18:31:06.592517"
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"no column 'no' \(columns there: .*\): correct data.pair_id"):
        load(path, extractor="plain", pair_id="no")


@pytest.mark.slow
def test_a_hub_dataset_and_its_held_out_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of data files is loaded by the same call as a name on the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    write(folder / "test.jsonl", ROWS[1:])
    train = load(str(folder))
    assert [example.columns["answer"] for example in train] == ["1080", "-3"]
    held_out = load(str(folder), "held_out", eval_split="test")
    assert [example.columns["answer"] for example in held_out] == ["-3"]
    assert load(str(folder), "held_out") == []
    with pytest.raises(ConfigError, match=r"no/such-dataset \(train\) cannot be loaded"):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        load("no/such-dataset")


def test_answers_that_are_numbers(tmp_path: Path) -> None:
    """int, float, Decimal and NumPy's numbers are read by their value; 1.5e-06 stays that number."""
    import numpy
    import pyarrow
    import pyarrow.parquet

    values: list[Any] = [7, 1.5e-06, Decimal("10.50"), Decimal("1E+3")]
    for value, answer in zip(values, ["7", "1.5e-06", "10.50", "1000"], strict=True):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([{"question": "q", "answer": value}]), tmp_path / "a.parquet"
        )
        [example] = load(str(tmp_path / "a.parquet"), extractor="number")
        assert example.columns["answer"] == answer and parse_number(answer) == Fraction(str(value))
    rows = [{"question": "q", "answer": numpy.int64(7)}, {"question": "q", "answer": numpy.float32(0.5)}]
    found = load_rows(table_of("mine", rows), DataConfig(extractor="number"), BadRows())
    assert [example.columns["answer"] for example in found] == ["7", "0.5"]


def test_questions_are_normalised_like_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "cafe\u0301?", "answer": "re\u0301"}])
    [example] = load(path, extractor="plain", system_prompt=None)
    assert example.messages == [{"role": "user", "content": "caf\u00e9?"}]
    assert (example.columns["question"], example.columns["answer"]) == ("caf\u00e9?", "r\u00e9")


def test_csv_and_parquet_give_what_jsonl_gives(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    expected = load(write(tmp_path / "a.jsonl", ROWS))
    csv_lines = ["question,answer"] + [f'"{row["question"]}","{row["answer"]}"' for row in ROWS]
    (tmp_path / "a.csv").write_text("\ufeff" + "\n".join(csv_lines) + "\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert load(str(tmp_path / "a.csv")) == expected
    assert load(str(tmp_path / "a.parquet")) == expected


@pytest.mark.parametrize(
    "name",
    [
        "TRAIN.JSONL",
        "my rows.jsonl",
        "a.ndjson",
        "a.json",
        "lines.json",
        "a.jsonl.gz",
        "a.json.xz",
        "a.csv.bz2",
        "a.tsv",
        "semicolons.csv",
        "bars.csv",
        "A.CSV.GZ",
    ],
)
def test_an_existing_file_is_read_whatever_its_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks like owner/name of the hub, and is a file."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    separator = {"a.tsv": "\t", "semicolons.csv": ";", "bars.csv": "|"}.get(name, ",")
    lines = ["".join(json.dumps(row) + "\n" for row in ROWS)]
    if ".csv" in name.lower() or ".tsv" in name:
        quoted = [f'"{row["question"]}"{separator}"{row["answer"]}"' for row in ROWS]
        lines = [f"question{separator}answer\n" + "\n".join(quoted) + "\n"]
    elif ".json" in name and ".jsonl" not in name and name != "lines.json":
        lines = [json.dumps(ROWS, indent=2)]
    content = lines[0].encode()
    for ending, compress in {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.items():
        content = compress(content) if name.lower().endswith(ending) else content
    (tmp_path / "data" / name).write_bytes(content)
    assert [example.columns["answer"] for example in load(f"data/{name}")] == ["1080", "-3"]
    assert [example.columns["answer"] for example in load(f"data/{name}", name="gsm8k")] == ["1080", "-3"]


def test_a_data_file_that_is_missing_is_not_sought_on_the_hub() -> None:
    for name in ("data/train.json", "data/train.txt", "data/train.jsonl.gz", "data/TRAIN.CSV"):
        assert not is_hub_name(name)
        with pytest.raises(ConfigError, match=f"data.path: there is no file {name}"):
            load(name)
    assert is_hub_name("openai/gsm8k") and is_hub_name("owner/data-1.0")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            '[\n{"question": "q", "answer": "1"},\n\n{"question": \n]',
            r"a.json:4: not JSON, in the object that",
        ),
        ("a.json", '[{"question": "q", "answer": "1"}\n{"question"', r"a.json:2: not JSON: expected ',' or ']'"),
        ("a.json", '[{"question": "q", "answer": "1"},\n 3]', r"a.json:2: a int, the array must hold JSON objects"),
        ("a.json", '[{"question": "q", "answer": "1"}] x', "there is text after the array"),
        ("a.json", '{\n"data": []\n}', r"a.json: must hold a JSON array of objects"),
        ("a.json", '"text"', r"a.json: must hold a JSON array of objects"),
        ("a.json", '[{"question": "q", "a": 1, "a": 2}]', r"a.json:1: the key 'a' is there twice"),
        (
            "a.jsonl",
            '{"question": "q", "answer": "1"}\n{"answer": "1", "n": {"b": 1, "b": 2}}',
            r"a.jsonl:2: the key 'b' is",
        ),
        ("a.csv", "question,answer,note,note\nq,1,a,b\n", r"a.csv:1: the column 'note' is there twice"),
        ("a.csv", "question,answer,,\nq,1,,\n", r"a.csv:1: the column '' is there twice"),
        ("a.jsonl.gz", "no gzip", r"a.jsonl.gz cannot be read"),
        ("a.parquet.gz", "x", r"ends in '.parquet.gz', it must be one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
        ("a.txt", "x", r"ends in '.txt', it must be one of"),
    ],
)
def test_files_that_cannot_be_read_whole(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(str(tmp_path / name), extractor="plain")


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        [pyarrow.array(["q"]), pyarrow.array(["1"]), pyarrow.array(["2"])],
        ["question", "answer", "answer"],
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a.parquet: the column 'answer' is there twice"):
        load(str(tmp_path / "a.parquet"), extractor="plain")


def test_a_long_field_of_a_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f'question,answer\n"{"q" * 200_000}",1\n')
    [example] = load(str(tmp_path / "a.csv"), extractor="plain")
    assert len(example.columns["question"]) == 200_000


@pytest.mark.parametrize("way", ["streamed", "mapped"])
def test_half_a_character_is_left_out_of_streams_and_caches(tmp_path: Path, way: str) -> None:
    rows = [*ROWS, {"question": "q", "answer": "#### 1", "note": ["\ud83d"]}]
    path = write(tmp_path / "a.jsonl", rows)
    for bad_rows, fails in (("error", True), ("skip", False)):
        data, bad = DataConfig(path=path, bad_rows=bad_rows), BadRows(skip=not fails)
        with pytest.raises(ConfigError, match="a.jsonl:3: column 'note' holds") if fails else nullcontext():
            examples = peek(data, bad) if way == "streamed" else load_examples(data, "train", 0, bad)
    assert len(examples) == 2 and bad.rejected[0]["place"].endswith("a.jsonl:3")
    json.dumps(bad.rejected, ensure_ascii=False).encode()  # and its reason can be written and printed


def test_trl_prompts(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "2 + 2?"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": "The sky is", "length": 3}, {"prompt": chat, "answer": "#### 4"}])
    assert load(path) == [
        Example("The sky is", {"question": "The sky is", "length": 3}),
        Example(chat, {"question": "2 + 2?", "answer": "4", "solution": "#### 4"}),
    ]
    with pytest.raises(ConfigError, match=r"b.jsonl:1: column 'prompt' is '\[\]'"):
        load(write(tmp_path / "b.jsonl", [{"prompt": []}]))


def test_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate_problems(count: int, *, seed: int, split: str) -> list[dict[str, str]]:
        return [{"question": f"{split} {seed} {index}", "answer": f"#### {index}"} for index in range(count)]

    monkeypatch.setattr("grpo.data.arithmetic.generate_problems", generate_problems)
    train = load_examples(DataConfig(name="arithmetic"), "train", seed=5)
    held_out = load_examples(DataConfig(name="arithmetic", eval_size=20), "held_out", seed=5)
    assert (len(train), len(held_out)) == (4000, 20)
    assert train[3].columns == {"question": "train 5 3", "answer": "3", "solution": "#### 3"}
    assert held_out[0].columns["question"] == "held_out 5 0"


def test_a_dataset_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    built = [Example("text", {"a": 1})]
    entries = {"rows": lambda data, part, seed: ROWS, "built": lambda data, part, seed: built}
    monkeypatch.setattr(DATASETS, "_entries", {**DATASETS._entries, **entries})
    assert load_examples(DataConfig(name="rows"), "train", 0)[1].columns["answer"] == "-3"
    assert load_examples(DataConfig(name="built"), "train", 0) == built
    monkeypatch.setattr(DATASETS, "_entries", {"none": lambda data, part, seed: []})
    with pytest.raises(ConfigError, match="none is empty"):
        load_examples(DataConfig(name="none"), "train", 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "q", "answer": "#### 1"}\n\n{"question": ', r"a.jsonl:3: not JSON"),
        ('{"question": "q", "answer": "#### 1"}\n[1]', r"a.jsonl:2: a list, each line must be a JSON object"),
        (b'{"question": "q"}\n\xff\xfe', r"a.jsonl:2: not UTF-8"),
        ("\n\n", r"a.jsonl is empty"),
        ('{"q": "q", "answer": "#### 1"}', r"a.jsonl:1: there is no column 'question' \(columns there: q, answer\)"),
        ('{"question": "q", "gold": "1"}', r"a.jsonl:1: there is no column 'answer' \(columns there: question, gold\)"),
        ('{"question": "", "answer": "#### 1"}', r"a.jsonl:1: column 'question' is '', it must be"),
        ('{"question": 5, "answer": "#### 1"}', r"a.jsonl:1: column 'question' is 5"),
        ('{"question": "q", "answer": null}', r"0 of 1 answers fit .*the column 'answer' is empty"),
        ('{"question": "q", "answer": "it is 5"}\n' * 3, r"0 of 3 answers fit extractor 'hash' \(#### N\); 'number' fits 3: set data.extractor number"),  # noqa: E501
        ('{"question": "q", "answer": "tea"}', r"'plain' fits 1: set data.extractor plain"),
        ('{"question": "q", "answer": "#### 1"}\n{"question": "q", "answer": "two"}', r"a.jsonl:2: no answer for extractor 'hash' .*'two'; the same for 1 of 2 rows"),  # noqa: E501
        ('{"question": "q", "answer": "#### 1", "completion_ids": 1}', r"a.jsonl:1: a column cannot be called 'completion_ids'"),  # noqa: E501
    ],
)  # fmt: skip
def test_an_unusable_file_is_named_with_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        load(str(path))


def test_other_unusable_sources(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.path: there is no file /no/such.jsonl"):
        load("/no/such.jsonl")
    with pytest.raises(ConfigError, match=r"data.eval_path: there is no file /no/such.jsonl"):
        load("/no/train.jsonl", "held_out", eval_path="/no/such.jsonl")
    with pytest.raises(ConfigError, match="data.path is null"):
        load_examples(DataConfig(name="question_answer"), "train", 0)
    with pytest.raises(ConfigError, match="data.extractor is 'hsh'"):
        load(write(tmp_path / "a.jsonl", ROWS), extractor="hsh")
    for name, content, message in [
        ("a.txt", "text", r"ends in '.txt'"),
        ("a.parquet", "text", r"a.parquet: not a Parquet file"),
        ("a.csv", "question,answer\nq,a,b\n", r"a.csv:2: this row must have 2 fields"),
        ("b.csv", "question,answer\nq\n", r"b.csv:2: this row must have 2 fields"),
        ("c.csv", 'question,answer\nq,"a\n', r"c.csv:2: not CSV"),
    ]:
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            load(str(tmp_path / name))


@pytest.mark.skipif("GRPO_GSM8K_DIR" not in os.environ, reason="GRPO_GSM8K_DIR: a folder with train.jsonl, test.jsonl")
@pytest.mark.parametrize(("file", "count"), [("train.jsonl", 7473), ("test.jsonl", 1319)])
def test_every_gold_answer_of_the_real_gsm8k_is_a_number(file: str, count: int) -> None:
    examples = load(str(Path(os.environ["GRPO_GSM8K_DIR"]) / file), name="gsm8k")
    assert len(examples) == count
    assert [example for example in examples if parse_number(example.columns["answer"]) is None] == []
