"""pair_id stays unchanged from the file to rewards, rollouts, evaluation, feedback and the next data version."""

import json
import unicodedata
from pathlib import Path

from grpo.config.parser import load_config
from grpo.data.invented_language import generate_rows, make_lexicon
from grpo.tools.community.feedback import new_feedback
from grpo.tools.community.merge import merge
from grpo.trainer import train
from tests.fakes import tiny_folder

SEEN = """
import json
def seen(prompts, completions, pair_id, generated_at, answer, solution, **columns):
    with open({path!r}, "a") as file:
        for row in zip(pair_id, generated_at, answer, solution):
            file.write(json.dumps(row) + "\\n")
    return [0.0] * len(completions)
"""


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_rows_identity_goes_everywhere_with_it(tmp_path: Path) -> None:
    lexicon = make_lexicon(0, nouns=30)
    rows = generate_rows(8, lexicon=lexicon)
    held_out = generate_rows(4, lexicon=lexicon, split="held_out")
    rows[3]["answer"] = unicodedata.normalize("NFD", rows[3]["answer"])  # as some keyboards type it
    for name, part in (("train", rows), ("held_out", held_out)):  # under names of their own: the column map
        renamed = [{"nr": f"{name}-{row.pop('pair_id')}", "made": row.pop("generated_at"), **row} for row in part]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in renamed]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "seen.py").write_text(SEEN.format(path=str(tmp_path / "seen.jsonl")))
    flags = {
        "data.name": "question_answer",
        "data.path": tmp_path / "train.jsonl",
        "data.eval_path": tmp_path / "held_out.jsonl",
        "data.pair_id": "nr",
        "data.generated_at": "made",
        "data.extractor": "quoted_terms",
        "data.system_prompt": "null",
        "rewards": json.dumps({"term_match": 0.6, "chrf": 0.4, f"{tmp_path}/seen.py:seen": 0.0}),
        "scoring.workers": 0,
        "model.name": tiny_folder(tmp_path / "model"),
        "steps": 1,
        "prompts_per_step": 8,
        "sampling.num_generations": 2,
        "sampling.max_completion_length": 4,
        "tracking.report_to": "[]",
        "tracking.report": "false",
        "run_dir": tmp_path / "run",
    }
    run = train(load_config([f"--{key}={value}" for key, value in flags.items()]))
    by_id = {row["nr"]: row for row in read(tmp_path / "train.jsonl")}

    given = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    others = {row["nr"] for row in read(tmp_path / "held_out.jsonl")}
    assert {pair_id for pair_id, *_ in given} == {*by_id} | others  # evaluation calls rewards too
    given = [row for row in given if row[0] in by_id]
    assert sorted(pair_id for pair_id, *_ in given) == sorted([*by_id] * 2)  # each prompt once, two completions each
    for pair_id, made, answer, solution in given:
        assert (made, solution) == (by_id[pair_id]["made"], by_id[pair_id]["answer"])  # to the byte, NFD too
        assert unicodedata.is_normalized("NFC", answer) and answer in unicodedata.normalize("NFC", solution)

    columns: dict = {}
    for row in read(run / "rollouts.jsonl"):
        columns = row.get("columns", columns)  # once per prompt
        assert columns["generated_at"] == by_id[columns["pair_id"]]["made"]
        assert row["prompt"] == by_id[columns["pair_id"]]["question"]
        assert columns["source_language"] == "English"

    evaluated = read(run / "evaluations.jsonl")
    assert [row["step"] for row in evaluated] == [0] * 4 + [1] * 4
    assert [row["columns"]["pair_id"] for row in evaluated[:4]] == [
        row["nr"] for row in read(tmp_path / "held_out.jsonl")
    ]
    assert evaluated[0]["columns"]["generated_at"] == read(tmp_path / "held_out.jsonl")[0]["made"]

    said = read(run / "rollouts.jsonl")[0]  # somebody corrects one of them
    record = new_feedback(
        "correct",
        prompt=said["prompt"],
        completion=said["completion"] or "nothing",
        correction="It is `ẖâ`.",
        pair_id=said["columns"]["pair_id"],
        consent=True,
    )
    base = [{"pair_id": row["nr"], "question": row["question"], "answer": row["answer"]} for row in by_id.values()]
    merged = merge(base, [record]).rows
    assert [row["answer"] for row in merged if row["pair_id"] == record.pair_id] == ["It is `ẖâ`."]
    assert len(merged) == 8
