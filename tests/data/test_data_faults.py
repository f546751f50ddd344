"""Bad rows, repeated questions, letters beyond ASCII, odd tokenizers and odd lengths are reported or handled."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from grpo.config.parser import load_config
from grpo.config.schema import Config, DataConfig, TrackingConfig
from grpo.data.duplicates import count_repeats
from grpo.data.files import BadRows
from grpo.data.rendering import render_prompts
from grpo.data.rows import Example, load_examples
from grpo.errors import ConfigError
from grpo.rewards.math_answers import accuracy
from grpo.rewards.text_match import exact_match
from grpo.rewards.workers import RewardWorkerPool
from grpo.rollout.engine import end_token_ids
from grpo.rollout.native_engine import NativeEngine
from grpo.tracking.rollout_reader import rows_of_step
from grpo.tracking.run_logger import RunLogger
from grpo.trainer import train
from grpo.types import Completion, Group, Prompt, SamplingPlan
from tests.fakes import CharTokenizer, tiny_model
from tests.faulty_rewards import code_points
from tests.test_trainer import arguments, run

GOOD = {"question": "1+1=", "answer": "#### 2"}
LINE = json.dumps(GOOD).encode()
CORPUS: dict[str, tuple[bytes, str, str]] = {
    # name: (the line in the middle of a good file, where, what is said of it)
    "raw line break": (b'{"question": "a\nb", "answer": "#### 1"}', ":2", "not JSON"),
    "cut off": (LINE[:20], ":2", "not JSON"),
    "not an object": (b"[1, 2]", ":2", "a list, each line must be a JSON object"),
    "latin-1": '{"question": "é", "answer": "#### 1"}'.encode("latin-1"),
    "no question": (b'{"answer": "#### 1"}', ":2", "there is no column 'question'"),
    "null question": (b'{"question": null, "answer": "#### 1"}', ":2", "column 'question' is None"),
    "empty question": (b'{"question": " ", "answer": "#### 1"}', ":2", "column 'question' is ' '"),
    "number as question": (b'{"question": 7, "answer": "#### 1"}', ":2", "column 'question' is 7"),
    "no answer": (b'{"question": "q"}', ":2", "there is no column 'answer'"),
    "null answer": (b'{"question": "q", "answer": null}', ":2", "no answer for extractor 'hash'"),
    "no #### in it": (b'{"question": "q", "answer": "two"}', ":2", "no answer for extractor 'hash'"),
    "half a character": (
        b'{"question": "q", "answer": "#### 1", "note": "\\ud83d"}',
        ":2",
        r"column 'note' holds '\ud83d'",
    ),
    "half a character in a list": (
        b'{"question": "q", "answer": "1", "n": [{"a": "\\udc00"}]}',
        ":2",
        "column 'n' holds",
    ),
    "half a character in a name": (b'{"question": "q", "answer": "#### 1", "\\ud83d": 1}', ":2", "a lone surrogate"),
    "list as answer": (
        b'{"question": "q", "answer": ["#### 1"]}',
        ":2",
        "column 'answer' is ['#### 1'] (list), it must be",
    ),
    "mapping as answer": (
        b'{"question": "q", "answer": {"#### 1": 1}}',
        ":2",
        "(dict), it must be text or a finite number",
    ),
    "NaN as answer": (
        b'{"question": "q", "answer": NaN}',
        ":2",
        "column 'answer' is nan (float), it must be text or a",
    ),
    "truth value as answer": (
        b'{"question": "q", "answer": true}',
        ":2",
        "column 'answer' is True (bool), it must be text",
    ),
    "reserved column": (b'{"question": "q", "answer": "#### 1", "prompts": 1}', ":2", "cannot be called 'prompts'"),
}  # type: ignore[dict-item]
CORPUS["latin-1"] = (CORPUS["latin-1"], ":2", "not UTF-8")  # type: ignore[assignment]


@pytest.mark.parametrize("name", CORPUS)
def test_a_bad_row_is_named_or_left_out(tmp_path: Path, name: str) -> None:
    """R14. `data.bad_rows error` stops at file and line; `skip` uses the other rows and reports rejected ones."""
    bad_line, where, says = CORPUS[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + LINE + b"\n" + bad_line + b"\n\n" + LINE
    )  # a BOM, a blank line, no end: all fine
    with pytest.raises(ConfigError) as caught:
        load_examples(DataConfig(path=str(path)), "train", 0)
    assert f"a.jsonl{where}: " in str(caught.value) and says in str(caught.value)
    bad = BadRows()
    examples = load_examples(DataConfig(path=str(path), bad_rows="skip"), "train", 0, bad)
    assert [example.columns["question"] for example in examples] == ["1+1=", "1+1="]
    assert {row["place"].rpartition(":")[0] for row in bad.rejected} == {str(path)}
    assert bad.rejected[0]["place"] == f"{path}{where}" and says in bad.rejected[0]["reason"]
    assert len(bad.rejected) == (2 if name == "raw line break" else 1)


def test_a_run_writes_down_the_rows_that_it_left_out(tmp_path: Path) -> None:
    """R14. bad_rows error: no weight is loaded. skip: the run uses the other rows, and rejected.jsonl lists them."""
    flags = arguments(tmp_path, "run", steps=1, eval_every=0, save_every=0)
    data = tmp_path / "data.jsonl"
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(data.read_bytes() + CORPUS["cut off"][0] + b"\n" + CORPUS["null answer"][0] + b"\n")
    with pytest.raises(ConfigError, match=r"bad\.jsonl:13: not JSON"):
        train(load_config([*flags, f"--data.path={bad}", "--model.name=/no/such/model"]))
    train(load_config([*flags, f"--data.path={bad}", "--data.bad_rows=skip"]))
    rejected = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert [row["place"] for row in rejected] == [f"{bad}:13", f"{bad}:14"]
    assert "not JSON" in rejected[0]["reason"] and "no answer" in rejected[1]["reason"]


def test_repeated_and_leaked_questions_are_counted() -> None:
    """R15. Spaces and the encoding of accents do not change a question."""
    train = [
        Prompt(0, "café  one", (1,)),
        Prompt(1, [{"role": "user", "content": "cafe\u0301 one "}], (1,)),
        Prompt(2, "b", (1,)),
    ]
    held_out = [Prompt(0, "café one", (1,)), Prompt(1, "c", (1,))]
    found = count_repeats(train, held_out)
    assert (found.repeated, found.known) == (1, 1)
    warnings = found.warnings()
    assert "1 of 3 training prompts repeat another one" in warnings[0]
    assert "1 of 2 held-out questions are among the training prompts" in warnings[1]
    assert count_repeats(train[2:], held_out[1:]).warnings() == []


LETTERS = ["îâûôê ṯ ẖ ’ \u00a0", "čšžŋ", "🦜👩‍👩‍👧", "שלום مرحبا", "\u0000", "a\u2028b\u2029c\x85d"]


@pytest.mark.parametrize("text", LETTERS, ids=repr)
def test_letters_come_back_as_they_were(tmp_path: Path, text: str) -> None:
    """R16. From the file to the columns, to rollouts.jsonl and to the dashboard."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "q" + text, "answer": "#### 1", "note": text}) + "\n")
    [example] = load_examples(DataConfig(path=str(path), system_prompt=None), "train", 0)
    assert example.columns["note"] == text and example.messages[-1]["content"] == "q" + text
    tracker = RunLogger(tmp_path, Config(tracking=TrackingConfig(report_to=[])), {}, 0)
    row = {"step": 1, "draw": 0, "sample": 0, "prompt": "q" + text, "completion": text, "columns": example.columns}
    tracker.log(1, {}, [row])
    tracker.finish()
    assert rows_of_step(tmp_path / "rollouts.jsonl", 1) == [row]  # as the dashboard reads it


def test_rewards_in_other_processes_see_the_letters_as_they_are() -> None:
    """R16. Completion and columns are compared by code points."""
    runner = RewardWorkerPool({"tests.faulty_rewards:code_points": 1.0})
    try:
        groups = [
            Group(Prompt(0, "q", (1,), {"note": text}), [Completion([0], [0.0], True, text + "!")]) for text in LETTERS
        ]
        scores = runner(groups)
    finally:
        runner.close()
    assert scores.failures == []
    assert scores.rewards_PG.flatten().tolist() == [
        value for text in LETTERS for value in code_points([text + "!"], [text])
    ]


def test_both_sides_are_compared_in_nfc() -> None:
    for word in ("ẖ", "tâga", "ṯîne", "é"):
        for given, gold in [("NFC", "NFD"), ("NFD", "NFC")]:
            text, answer = unicodedata.normalize(given, word), unicodedata.normalize(gold, word)
            assert exact_match([f"<answer>{text}</answer>"], [answer]) == [1.0]
            assert accuracy([f"<answer>{text}</answer>"], [answer]) == [1.0]
    assert exact_match(["gâta"], ["tâga"]) == [0.0]


@pytest.mark.parametrize("length", [3, 4, 5])
def test_the_limit_counts_the_chat_template(length: int) -> None:
    """R13. "ab" is 2 tokens, and 4 with its template: kept at the limit, left out one token below it, never cut."""

    class Templated:
        chat_template, bos_token_id = "x", None

        def apply_chat_template(self, chats: Any, **_: Any) -> list[list[int]]:
            return [[8, *map(ord, messages[-1]["content"]), 9] for messages in chats]

    examples = [Example([{"role": "user", "content": text}]) for text in ("ab", "")]
    prompts, dropped = render_prompts(examples, Templated(), length)
    assert [prompt.token_ids for prompt in prompts] == ([(8, 97, 98, 9)] if length >= 4 else []) + [(8, 9)]
    assert dropped == int(length < 4)


def test_end_tokens() -> None:
    """R18. Several end tokens, one that is also the padding token, and none."""
    model, tokenizer = tiny_model(), CharTokenizer()
    model.generation_config = GenerationConfig(eos_token_id=[7, 3])
    assert end_token_ids(model, tokenizer) == [0, 3, 7]  # type: ignore[arg-type]
    model.generation_config = GenerationConfig()
    tokenizer.eos_token_id = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="no completion could ever end: set eos_token"):
        end_token_ids(model, tokenizer)  # type: ignore[arg-type]


def test_the_end_token_is_trained_where_it_is_the_padding_too() -> None:
    """R18. Lengths are recorded, not derived from padding: the first end token stays in the completion."""
    tokenizer = CharTokenizer()
    tokenizer.pad_token_id = tokenizer.eos_token_id
    engine = NativeEngine(tiny_model(), tokenizer, slots=4, uses_packed_attention=True)  # type: ignore[arg-type]
    [group] = engine.generate([Prompt(0, "x", (12, 13))], SamplingPlan(16, 30, 1.0, 0))
    ended = [completion for completion in group.completions if completion.ended]
    assert ended and all(completion.token_ids[-1] == 0 and 0 not in completion.token_ids[:-1] for completion in ended)


def shaped(monkeypatch: pytest.MonkeyPatch, ids: list[int], ended: bool, text: str) -> None:
    """An engine that always returns the same completion."""
    generate = NativeEngine.generate

    def replaced(self: NativeEngine, *arguments: Any, **named: Any) -> list[Group]:
        finished = named.pop("finished", None)
        groups = [
            Group(group.prompt, [Completion(list(ids), [-1.0] * len(ids), ended, text) for _ in group.completions])
            for group in generate(self, *arguments, **named)
        ]
        for group in groups if finished else []:
            finished(group)
        return groups

    monkeypatch.setattr(NativeEngine, "generate", replaced)


@pytest.mark.parametrize(
    ("ids", "ended", "truncated"),
    [([5] * 8, False, 1.0), ([0], True, 0.0), ([5], False, 1.0)],
    ids=["cut", "end", "one"],
)
@pytest.mark.parametrize("mask", [False, True])
def test_odd_lengths_are_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: list[int], ended: bool, truncated: float, mask: bool
) -> None:
    """R12. All truncated, all ended at once, one token each. Also with truncated ones masked, so that none is left."""
    monkeypatch.setattr("grpo.run.build.check_agreement", lambda *arguments: 0.0)  # it would notice the made-up ones
    shaped(monkeypatch, ids, ended, "")
    rows = run(tmp_path, "run", steps=2, eval_every=0, save_every=0, **{"objective.mask_truncated_completions": mask})
    for row in rows:
        assert all(value is not None and abs(value) < 1e6 for value in row.values()), row
        assert row["rollout/truncated_fraction"] == truncated and row["policy/skipped_steps"] == 0
