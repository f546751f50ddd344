"""Merging feedback: by hand; idempotent, independent of the order, without a trace of withdrawn feedback."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from grpo.errors import ConfigError
from grpo.rewards.registry import REWARDS
from grpo.tools.community.feedback import Feedback, parse_feedback
from grpo.tools.community.merge import merge, read_rows_of, versions_in, write_version

BASE = [
    {"question": "What is stone?", "answer": "It is `tâga`.", "pair_id": 1, "generated_at": "2025-10-28T00:00:01"},
    {"question": "What is river?", "answer": "It is `nîẖo`.", "pair_id": 2, "generated_at": "2025-10-28T00:00:02"},
]
RIGHT, OTHER = "It is `tâge`.", "It is `tôge`."


def said(number: int, verdict: str, **fields: Any) -> Feedback:
    """Return a record; the number is its time and a part of its id."""
    record = {"feedback_id": f"id{number}", "created_at": f"2026-01-01T00:{number:02}:00", "verdict": verdict}
    if verdict != "withdraw":
        record |= {"prompt": "What is stone?", "completion": "It is `tâga`.", "pair_id": 1, "consent": True}
        record["reviewer"] = f"reviewer{number}"
    if verdict == "correct":
        record["correction"] = RIGHT
    return parse_feedback(record | fields, "test")


def first(*feedback: Feedback) -> dict:
    return merge(BASE, feedback).rows[0]


def test_a_correction_replaces_the_answer_and_turns_the_old_one_down() -> None:
    merged = merge(BASE, [said(1, "correct", note="private", rating=2)])
    assert merged.rows[0] == BASE[0] | {
        "answer": RIGHT, "origin": "feedback", "accepted": [RIGHT], "disallowed": ["It is `tâga`."]
    }  # fmt: skip
    assert merged.rows[1] == BASE[1] | {"origin": "base", "accepted": [], "disallowed": []}
    assert merged.changes == [{"pair_id": 1, "change": "corrected", "votes": 1}]
    assert BASE[0]["answer"] == "It is `tâga`."  # the caller's rows are not changed


def test_accept_and_reject() -> None:
    row = first(said(1, "accept", completion="One says `tâga`."), said(2, "reject", completion="It is `gâta`."))
    assert row["answer"] == "It is `tâga`." and row["origin"] == "base"
    assert row["accepted"] == ["It is `tâga`.", "One says `tâga`."] and row["disallowed"] == ["It is `gâta`."]


def test_a_majority_wins_and_a_tie_is_quarantined() -> None:
    two_to_one = [said(1, "correct"), said(2, "correct"), said(3, "correct", correction=OTHER)]
    assert first(*two_to_one)["answer"] == RIGHT
    merged = merge(BASE, two_to_one[1:])
    assert merged.rows[0]["answer"] == "It is `tâga`." and merged.rows[0]["origin"] == "base"
    assert merged.quarantined == [{"pair_id": 1, "answers": 2, "votes": 1}]
    # The answer as it stands has voters too.
    keep = [said(1, "correct"), said(2, "accept"), said(3, "accept")]
    assert first(*keep)["answer"] == "It is `tâga`."


def test_a_reviewer_has_one_vote_the_latest() -> None:
    stuffed = [said(number, "correct", correction=OTHER, reviewer="magpie") for number in range(1, 9)]
    fair = [said(10, "correct"), said(11, "correct")]
    assert first(*stuffed, *fair)["answer"] == RIGHT
    assert first(said(1, "correct"), said(2, "correct", correction=OTHER, reviewer="reviewer1"))["answer"] == OTHER


def test_a_question_of_ones_own_becomes_a_row() -> None:
    merged = merge(BASE, [said(1, "correct", prompt="What is wind?", pair_id=None, correction="It is `ôẖa`.")])
    assert merged.rows[2]["question"] == "What is wind?" and merged.rows[2]["answer"] == "It is `ôẖa`."
    assert merged.rows[2]["origin"] == "feedback" and merged.counts["added"] == 1
    known = merge(BASE, [said(1, "correct", pair_id=None)])  # a question that is in the archive is that row's
    assert known.rows[0]["answer"] == RIGHT and len(known.rows) == 2
    assert merge(BASE, [said(1, "correct", pair_id=99, prompt="gone")]).counts["unknown_pair_id"] == 1


def test_without_consent_it_is_counted_and_not_used() -> None:
    merged = merge(BASE, [said(1, "correct", consent=False)])
    assert merged.rows[0]["answer"] == "It is `tâga`."
    assert merged.counts["without_consent"] == 1 and merged.used == []


def test_twice_is_once_and_order_means_nothing(tmp_path: Path) -> None:
    lines = [said(number, "correct", correction=random.Random(number).choice([RIGHT, OTHER])) for number in range(1, 8)]
    lines += [said(20, "reject"), said(21, "accept", reviewer="reviewer3"), said(22, "withdraw", reviewer="reviewer5")]
    first_folder, new = write_version(tmp_path, merge(BASE, lines))
    assert new and first_folder.name == "v1"
    for seed in range(5):
        shuffled = random.Random(seed).sample(lines, len(lines))
        assert write_version(tmp_path, merge(BASE, shuffled)) == (first_folder, False)
    assert [path.name for path in versions_in(tmp_path)] == ["v1"]
    second, new = write_version(tmp_path, merge(BASE, lines[1:]))
    assert new and second.name == "v2"
    record = json.loads((second / "version.json").read_text())
    assert record["parent"] == json.loads((first_folder / "version.json").read_text())["sha256"]
    assert read_rows_of(second) == merge(BASE, lines[1:]).rows


def test_who_withdraws_leaves_no_trace(tmp_path: Path) -> None:
    mine = "It is `ẖâzu`."
    write_version(tmp_path, merge(BASE, []))
    lines = [said(1, "correct", correction=mine, reviewer="heron", note="my grandmother"), said(2, "reject", pair_id=2)]
    v2, _ = write_version(tmp_path, merge(BASE, lines))
    assert mine in (v2 / "data.jsonl").read_text()
    v3, _ = write_version(tmp_path, merge(BASE, [*lines, said(9, "withdraw", reviewer="heron")]))
    assert v3.name == "v3"
    everything = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for trace in (mine, "ẖâzu", "heron", "grandmother", "id1"):
        assert trace not in everything
    with pytest.raises(ConfigError, match="withdrawn; use a later version"):
        read_rows_of(v2)
    assert read_rows_of(v3)[0]["answer"] == "It is `tâga`."


def test_other_withdrawals() -> None:
    two = [said(1, "correct"), said(2, "correct", prompt="What is river?", pair_id=2, reviewer="reviewer1")]
    one_line = merge(BASE, [*two, said(5, "withdraw", withdraws="id1")])
    assert [row["origin"] for row in one_line.rows] == ["base", "feedback"]
    one_pair = merge(BASE, [*two, said(5, "withdraw", reviewer="reviewer1", pair_id=1)])
    assert [row["origin"] for row in one_pair.rows] == ["base", "feedback"]
    whole_row = merge(BASE, [*two, said(5, "withdraw", pair_id=1)])
    assert [row["pair_id"] for row in whole_row.rows] == [2]
    again = merge(BASE, [*two, said(5, "withdraw", reviewer="reviewer1"), said(7, "correct", reviewer="reviewer1")])
    assert [row["origin"] for row in again.rows] == ["feedback", "base"]  # said again, after it


def test_names_and_notes_stay_out(tmp_path: Path) -> None:
    payload = '<img src=x onerror=alert(1)> =HYPERLINK("x")'
    write_version(tmp_path, merge(BASE, [said(1, "correct", note=payload, reviewer="heron <script>")]))
    everything = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "onerror" not in everything and "HYPERLINK" not in everything and "heron" not in everything


def test_a_changed_version_is_noticed(tmp_path: Path) -> None:
    folder, _ = write_version(tmp_path, merge(BASE, []))
    with (folder / "data.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ConfigError, match="was changed after it was written"):
        read_rows_of(folder)


def test_the_feedback_reward_by_hand() -> None:
    completions = [
        "It is `tâge`.",
        "One says `tâge`, of course.",
        "It is  `tâga`.",
        "I do not know.",
        "anything",
    ]
    accepted = [[RIGHT]] * 4 + [[]]
    disallowed = [["It is `tâga`."]] * 4 + [[]]
    assert REWARDS.get("feedback")(completions=completions, accepted=accepted, disallowed=disallowed) == [
        1.0, 1.0, -1.0, 0.0, None
    ]  # fmt: skip
    assert REWARDS.get("feedback")(completions=["a"]) == [None]  # data without feedback: it does not apply
