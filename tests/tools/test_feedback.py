"""The feedback file: concurrent writers, torn lines, rejected records."""

import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest

from grpo.errors import ConfigError, StorageError
from grpo.tools.community.feedback import from_plain_records, new_feedback, parse_feedback, to_plain_records
from grpo.tools.community.feedback_file import append_feedback, read_feedback

HOSTILE = '<img src=x onerror=alert(1)>\n=HYPERLINK("http://x")\x1b]52;c;\u202e'


def correction(**fields: object) -> dict:
    return {"prompt": "What is stone?", "completion": "`tâga`", "correction": "`tâge`", "consent": True} | fields


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "feedback.jsonl"
    first = new_feedback("correct", **correction(pair_id=7, rating=4, note=HOSTILE, reviewer="heron"))
    second = new_feedback("withdraw", reviewer="heron")
    append_feedback(path, first)
    append_feedback(path, second)
    assert read_feedback(path) == (sorted([first, second], key=lambda record: record.feedback_id), [])
    assert path.read_bytes().count(b"\n") == 2  # the note's line break is escaped
    assert first.note == HOSTILE
    assert read_feedback(path, path)[0] == read_feedback(path)[0]  # the same line twice is one
    assert path.stat().st_mode & 0o077 == 0  # others on the machine do not read it


def test_texts_are_composed() -> None:
    record = new_feedback("correct", **correction(correction=unicodedata.normalize("NFD", "`ẖôṯîga`")))
    assert record.correction == "`ẖôṯîga`"


WRITER = """
import sys
from grpo.tools.community.feedback import new_feedback
from grpo.tools.community.feedback_file import append_feedback
path, writer, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
for number in range(count):
    texts = {"prompt": f"q {number}", "completion": "ẖ" * (number % 50)}
    append_feedback(path, new_feedback("accept", **texts, reviewer=writer, consent=True))
    if number == 0:
        print("started", flush=True)
"""


def start_writer(path: Path, name: str, count: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])


def test_eight_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    writers = [start_writer(path, f"writer{index}", 500) for index in range(8)]
    assert [writer.wait() for writer in writers] == [0] * 8
    records, left_out = read_feedback(path)
    assert len(records) == 4000 and not left_out
    assert {(record.reviewer, record.prompt) for record in records} == {
        (f"writer{index}", f"q {number}") for index in range(8) for number in range(500)
    }


def test_a_writer_that_is_killed_costs_its_last_line_at_most(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    victim = start_writer(path, "victim", 100_000)
    assert victim.stdout is not None
    victim.stdout.readline()
    time.sleep(0.1)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    before, left_out = read_feedback(path)
    assert len(left_out) <= 1
    assert [record.prompt for record in sorted(before, key=lambda r: r.created_at)] == [
        f"q {n}" for n in range(len(before))
    ]
    # A line torn in the middle, whatever was torn above: the next writer does not lose its own to it.
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"feedback_id": "torn", "prom')
    append_feedback(path, new_feedback("accept", prompt="after"))
    after, left_out = read_feedback(path)
    assert len(after) == len(before) + 1
    assert "cut off" in left_out[-1] and str(path) in left_out[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "maybe"}, "verdict is 'maybe', it must be one of accept, reject, correct, withdraw"),
        ({"correction": ""}, "verdict 'correct' needs the right answer"),
        ({"verdict": "accept"}, "`correction` is given, but verdict is 'accept'"),
        ({"rating": 6}, "rating is 6"),
        ({"rating": True}, "rating is True"),
        ({"consent": "yes"}, "consent is 'yes'"),
        ({"pair_id": [1]}, "pair_id is"),
        ({"prompt": " "}, "prompt is empty"),
        ({"note": 5}, "note is 5"),
        ({"note": "x" * 100_001}, "note has 100001 characters"),
        ({"name": "Ann"}, "unknown field 'name'"),
        ({"schema": 2}, "schema is 2"),
    ],
)
def test_what_is_refused(changes: dict, message: str) -> None:
    record = {"feedback_id": "a", "created_at": "2026-01-01", "verdict": "correct"} | correction(**changes)
    with pytest.raises(ConfigError, match=message):
        parse_feedback(record, "f.jsonl:3")


def test_one_id_for_two_things_is_refused(tmp_path: Path) -> None:
    record = new_feedback("accept", prompt="a")
    append_feedback(tmp_path / "a", record)
    append_feedback(tmp_path / "b", parse_feedback({**vars(record), "prompt": "b"}, "b"))
    with pytest.raises(ConfigError, match="was used before"):
        read_feedback(tmp_path / "a", tmp_path / "b")


def test_annotation_tools_round_trip() -> None:
    records = [new_feedback("correct", **correction(note=HOSTILE)), new_feedback("reject", prompt="q", rating=1)]
    assert from_plain_records(json.loads(json.dumps(to_plain_records(records)))) == records


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write feedback"):
        append_feedback(tmp_path / "file" / "feedback.jsonl", new_feedback("accept", prompt="a"))
    assert os.listdir(tmp_path) == ["file"]
