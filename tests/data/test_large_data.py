"""Mapped, streamed and measured prompts: each equals the plain list, and resumes at the exact position."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from grpo.config.schema import Config, DataConfig
from grpo.data.curriculum import Curriculum
from grpo.data.files import BadRows
from grpo.data.invented_language import generate_rows
from grpo.data.mapped import map_prompts, mapped_folder, open_mapped, wants_mapping
from grpo.data.rendering import render_prompts
from grpo.data.rows import load_examples
from grpo.data.stream import PromptStream
from grpo.data.streaming import StreamedPrompts, buffer_shuffled, peek
from grpo.data.training_data import _make_mapped
from grpo.errors import ConfigError
from grpo.types import Prompt
from tests.data.test_stream import TEMPLATE, make_tokenizer

SETTINGS: dict[str, Any] = {"name": "question_answer", "extractor": "quoted_terms", "system_prompt": None}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write 60 rows, of which two are invalid."""
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "cache"))
    lines = [json.dumps(row, ensure_ascii=False) for row in generate_rows(58)]
    lines.insert(7, '{"question": "cut off')
    lines.insert(20, '{"question": "no term", "answer": "none here"}')
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def settings(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(**(SETTINGS | {"path": str(path), "bad_rows": "skip", "max_prompt_length": 8} | changes))


def test_faulty_rows_are_named_or_left_out(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"rows.jsonl:8: not JSON"):
        load_examples(settings(file, bad_rows="error"), "train", 0)
    bad = BadRows()
    assert len(load_examples(settings(file), "train", 0, bad)) == 58
    assert [Path(row["place"]).name for row in bad.rejected] == ["rows.jsonl:8", "rows.jsonl:21"]
    assert "not JSON" in bad.rejected[0]["reason"] and "no answer" in bad.rejected[1]["reason"]


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_mapped_prompts_are_the_same_prompts(file: Path, template: str | None) -> None:
    tokenizer, data = make_tokenizer(template), settings(file)
    examples = load_examples(data, "train", 0)
    lengths = [len(prompt.token_ids) for prompt in render_prompts(examples, tokenizer, None)[0]]
    limit = min(lengths)
    expected, dropped = render_prompts(examples, tokenizer, limit)
    assert 0 < dropped < len(examples)
    folder = mapped_folder(data, tokenizer)
    assert open_mapped(folder) is None
    made = map_prompts(folder, examples, tokenizer, limit, [{"place": "p", "reason": "r"}])
    found = open_mapped(folder)
    assert found is not None
    assert list(made) == list(found) == expected
    assert found[-2:] == expected[-2:]
    assert found.record["dropped"] == dropped and found.record["rejected"] == [{"place": "p", "reason": "r"}]
    assert PromptStream(found, 0).take(9, 8) == PromptStream(expected, 0).take(9, 8)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_changed_file_setting_or_tokenizer_has_another_folder(file: Path) -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    first = mapped_folder(settings(file), tokenizer)
    assert mapped_folder(settings(file, eval_size=7), tokenizer) == first
    others = {
        mapped_folder(settings(file, system_prompt="be brief"), tokenizer),
        mapped_folder(settings(file), make_tokenizer(None)),
        mapped_folder(settings(file, max_prompt_length=99), tokenizer),
        mapped_folder(settings(file, examples=[{"question": "q", "completion": "a"}]), tokenizer),
    }
    file.write_text(file.read_text() + "\n")
    others.add(mapped_folder(settings(file), tokenizer))
    assert len(others - {first}) == 5


def test_a_damaged_arrow_file_is_made_again(file: Path) -> None:
    tokenizer, data = make_tokenizer(None), settings(file)
    folder = mapped_folder(data, tokenizer)
    map_prompts(folder, load_examples(data, "train", 0), tokenizer, None, [])
    content = bytearray((folder / "prompts.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "prompts.arrow").write_bytes(content)
    assert open_mapped(folder) is None
    assert not folder.exists()


def test_what_is_mapped(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wants_mapping(settings(file))
    assert wants_mapping(settings(file, cache="always"))
    monkeypatch.setattr("grpo.data.mapped.MAP_FROM_BYTES", 100)
    assert wants_mapping(settings(file))
    assert not wants_mapping(settings(file, cache="never"))
    assert not wants_mapping(DataConfig(name="arithmetic", cache="always"))


@pytest.mark.parametrize("cache", ["auto", "always"])
def test_a_picture_is_no_reason_to_refuse_a_large_file(file: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """auto keeps the prompts in memory; only `always` is an error."""
    monkeypatch.setattr("grpo.data.mapped.MAP_FROM_BYTES", 100)
    config = Config(data=settings(file, cache=cache, max_prompt_length=None))
    examples = load_examples(config.data, "train", 0)
    examples[1].columns["image"] = b"\x00\x01"
    make = partial(_make_mapped, config, examples, make_tokenizer(None), BadRows(skip=True), Accelerator(cpu=True))
    if cache == "always":
        with pytest.raises(ConfigError, match="a column cannot be stored"):
            make()
    else:
        assert make() is None


def streamed(file: Path, **changes: Any) -> StreamedPrompts:
    return StreamedPrompts(settings(file, shuffle_buffer=10, **changes), make_tokenizer(None), seed=3)


def test_a_stream_holds_every_prompt_once_an_epoch(file: Path) -> None:
    prompts, _ = render_prompts(load_examples(settings(file), "train", 0), make_tokenizer(None), 8)
    stream = streamed(file)
    drawn = [prompt for step in range(len(prompts)) for prompt in stream.take(step, 2)]  # two epochs
    identities = [prompt.columns["pair_id"] for prompt in drawn]
    assert [prompt.draw for prompt in drawn] == list(range(2 * len(prompts)))
    first, second = identities[: len(prompts)], identities[len(prompts) :]
    assert sorted(first) == sorted(second) == sorted(prompt.columns["pair_id"] for prompt in prompts)
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("stop", [1, 10, 40])
def test_a_stream_goes_on_exactly(file: Path, stop: int) -> None:
    whole, part, resumed = streamed(file), streamed(file), streamed(file)
    expected = [whole.take(step, 3) for step in range(60)]
    for step in range(stop):
        part.take(step, 3)
    resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert [resumed.take(step, 3) for step in range(stop, 60)] == expected[stop:]


def test_ranks_share_a_stream(file: Path) -> None:
    whole = streamed(file).take(0, 6)
    for rank in range(2):
        assert streamed(file).take(0, 6, rank, 2) == whole[rank::2]


def test_streaming_knows_before_training_what_is_wrong(file: Path) -> None:
    assert len(peek(settings(file), BadRows(skip=True))) == 58
    with pytest.raises(ConfigError, match=r"its first 59 rows\): 0 of 59 answers fit extractor 'hash'"):
        peek(settings(file, extractor="hash"), BadRows(skip=True))
    with pytest.raises(ConfigError, match="data.path is null"):
        peek(DataConfig(name="question_answer"), BadRows())


def test_stirring_by_hand() -> None:
    assert list(buffer_shuffled(lambda: iter(range(5)), 1, "a")) == [0, 1, 2, 3, 4]  # a buffer of one keeps the order
    assert sorted(buffer_shuffled(lambda: iter(range(100)), 10, "a")) == list(range(100))


def curriculum(count: int = 3, **changes: Any) -> Curriculum:
    prompts = [Prompt(index, f"question {index}", (index,)) for index in range(count)]
    values = {"solved": 1.0, "hopeless": 0.0, "patience": 1, "return_after": 2} | changes
    return Curriculum(prompts, 0, **values)


def names(prompts: list[Prompt]) -> list[int]:
    return sorted(prompt.token_ids[0] for prompt in prompts)


def results(prompts: list[Prompt], *earned: float) -> list[tuple[int, float]]:
    """Return (draw, reward) of each prompt."""
    return [(prompt.draw, earned[prompt.token_ids[0]]) for prompt in prompts]


def test_solved_and_hopeless_prompts_are_set_aside_and_come_back() -> None:
    stream = curriculum()
    first = []
    for step in range(3):
        first += stream.take(step, 1)
        stream.update(results(first[-1:], 1.0, 0.5, 0.0))
    assert names(first) == [0, 1, 2]
    assert names(stream.take(2, 1)) == names(first[2:])  # the same step again is the same
    assert stream.metrics() == {"curriculum/solved": 1, "curriculum/hopeless": 1, "curriculum/active": 3}
    assert names(stream.take(3, 1)) == [1]  # epoch 1 draws the one that teaches
    assert names([*stream.take(4, 1), *stream.take(5, 1), *stream.take(6, 1)]) == [0, 1, 2]  # epoch 2: measured again


def test_patience_counts_in_a_row_only() -> None:
    stream = curriculum(1, patience=2)
    for step, (earned, away) in enumerate([(1, 0), (0, 0), (1, 0), (0.5, 0), (1, 0), (1, 1)]):
        stream.update(results(stream.take(step, 1), earned))
        assert len(stream.set_aside) == away
    assert names(stream.take(6, 1)) == [0]  # all are set aside: then nothing is


def test_without_results_it_is_a_plain_stream() -> None:
    prompts = [Prompt(index, f"question {index}", (index,)) for index in range(7)]
    stream = curriculum(7)
    assert [stream.take(step, 3) for step in range(9)] == [PromptStream(prompts, 0).take(step, 3) for step in range(9)]


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_curriculum_goes_on_exactly(stop: int) -> None:
    def go(stream: Curriculum, steps: range) -> list[list[Prompt]]:
        taken = []
        for step in steps:
            taken.append([*stream.take(step, 3, 0, 2), *stream.take(step, 3, 1, 2)])
            stream.update([(prompt.draw, (prompt.token_ids[0] + step) % 3 / 2) for prompt in taken[-1]])
        return taken

    expected = go(curriculum(10), range(12))
    part, resumed = curriculum(10), curriculum(10)
    go(part, range(stop))
    resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert go(resumed, range(stop, 12)) == expected[stop:]


def test_hopeless_must_be_below_solved() -> None:
    with pytest.raises(ConfigError, match="curriculum.hopeless"):
        curriculum(solved=0.0)
