"""Feedback: what people say about answers -> one JSON line each, appended safely by many writers, read back strictly.

    {"schema": 1, "feedback_id": "5f0c...", "created_at": "2026-01-31T10:00:00+00:00", "verdict": "correct",
     "pair_id": 7, "prompt": "How would you say 'stone' ...?", "completion": "It is `tâga`.", "correction": "It is `tâge`.",
     "rating": 4, "note": "my grandmother says it with e", "reviewer": "heron", "consent": true, "licence": "CC-BY-NC-4.0",
     "model_id": "outputs/run/final", "checkpoint_sha": "9b1c..."}

    {"schema": 1, "feedback_id": "77aa...", "created_at": "...", "verdict": "withdraw", "reviewer": "heron"}

A withdrawal takes back what was said before it: one line (`withdraws`: its feedback_id), or what a reviewer said about a
pair_id, or everything that a reviewer said; with a pair_id and no reviewer, the row itself leaves the data too. Writers
(chat, dashboard, imports) only append; everything else is made anew from the lines. Text is data: nothing here reads it.
"""

import contextlib
import hashlib
import json
import os
import unicodedata
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from grpo.errors import ConfigError, StorageError

SCHEMA = 1
Verdict = Literal["accept", "reject", "correct", "withdraw"]
VERDICTS = ("accept", "reject", "correct", "withdraw")
LONGEST_TEXT = 100_000
"""Characters in any one field."""


@dataclass(frozen=True)
class Feedback:
    """One person's word about one answer. Make it with `new_feedback`, which fills in the id and the time."""

    feedback_id: str
    created_at: str
    """UTC, ISO 8601."""
    verdict: Verdict
    prompt: str = ""
    completion: str = ""
    """What the model said."""
    correction: str | None = None
    """What it should have said; needed for `correct`, and only there."""
    pair_id: Any = None
    """The data row that the question came from; None for a question of one's own."""
    rating: int | None = None
    """1 to 5."""
    note: str = ""
    reviewer: str = "anonymous"
    """A pseudonym, never a real name."""
    consent: bool = False
    """May this be used to train? Without it, a line is counted and never used."""
    licence: str = ""
    model_id: str = ""
    checkpoint_sha: str = ""
    withdraws: str = ""
    """Only with `withdraw`: the feedback_id that is taken back."""
    schema: int = SCHEMA


def new_feedback(verdict: Verdict, **fields: Any) -> Feedback:
    """A checked record with a fresh id and the current time. Raises ConfigError that names the field."""
    stamp = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    return parse_feedback(
        {"feedback_id": uuid.uuid4().hex, "created_at": stamp, "verdict": verdict, **fields}, "feedback"
    )


def parse_feedback(record: Any, place: str) -> Feedback:
    """A JSON object -> Feedback, its texts in NFC. Raises ConfigError with the place, the field and the mend."""
    if not isinstance(record, dict):
        raise ConfigError(f"{place}: a {type(record).__name__}, each line must be a JSON object {{...}}")
    unknown = sorted(set(record) - set(Feedback.__dataclass_fields__))
    if unknown:
        raise ConfigError(
            f"{place}: unknown field '{unknown[0]}', a feedback line has {', '.join(Feedback.__dataclass_fields__)}"
        )
    if record.get("schema", SCHEMA) != SCHEMA:
        raise ConfigError(f"{place}: schema is {record['schema']!r}, this version reads {SCHEMA}")
    if record.get("verdict") not in VERDICTS:
        raise ConfigError(f"{place}: verdict is {record.get('verdict')!r}, it must be one of {', '.join(VERDICTS)}")
    values = dict(record)
    for name in (
        "feedback_id",
        "created_at",
        "prompt",
        "completion",
        "note",
        "reviewer",
        "licence",
        "model_id",
        "checkpoint_sha",
        "withdraws",
    ):
        value = values.get(name, "" if name not in ("feedback_id", "created_at") else None)
        if not isinstance(value, str) or (name in ("feedback_id", "created_at") and not value):
            raise ConfigError(f"{place}: {name} is {value!r}, it must be a text")
        if len(value) > LONGEST_TEXT:
            raise ConfigError(f"{place}: {name} has {len(value)} characters, at most {LONGEST_TEXT} are taken")
        values[name] = unicodedata.normalize("NFC", value)
    try:
        created = datetime.fromisoformat(values["created_at"])
    except ValueError as error:
        raise ConfigError(f"{place}: created_at is {values['created_at']!r}, it must be an ISO 8601 time") from error
    if created.tzinfo is None:
        created = created.replace(tzinfo=timezone.utc)
    values["created_at"] = created.astimezone(timezone.utc).isoformat(timespec="microseconds")  # so that texts compare
    values["reviewer"] = values["reviewer"].strip() or "anonymous"
    if not isinstance(values.get("consent", False), bool):
        raise ConfigError(f"{place}: consent is {values['consent']!r}, it must be true or false")
    rating = values.get("rating")
    if rating is not None and (type(rating) is not int or not 1 <= rating <= 5):
        raise ConfigError(f"{place}: rating is {rating!r}, it must be null or a whole number from 1 to 5")
    if not isinstance(values.get("pair_id"), str | int | None) or isinstance(values.get("pair_id"), bool):
        raise ConfigError(f"{place}: pair_id is {values['pair_id']!r}, it must be null, a number or a text")
    correction = values.get("correction")
    if values["verdict"] == "correct":
        if not isinstance(correction, str) or not correction.strip():
            raise ConfigError(f"{place}: verdict 'correct' needs the right answer in `correction`, got {correction!r}")
        if len(correction) > LONGEST_TEXT:
            raise ConfigError(f"{place}: correction has {len(correction)} characters, at most {LONGEST_TEXT} are taken")
        values["correction"] = unicodedata.normalize("NFC", correction).strip()
    elif correction:
        raise ConfigError(f"{place}: `correction` is given, but verdict is '{values['verdict']}': make it 'correct'")
    else:
        values["correction"] = None
    if values["verdict"] != "withdraw" and not values["prompt"].strip():
        raise ConfigError(f"{place}: prompt is empty, feedback must say what the question was")
    return Feedback(**values)


def append_feedback(path: str | Path, *records: Feedback) -> None:
    """Add lines to a feedback file, whole, after a lock that other processes wait for; on disk when this returns.

    A line that an earlier writer was killed in is closed off first, so that it can never swallow the next one. Raises
    StorageError.
    """
    data = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records).encode()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            with _locked(handle):
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    data = b"\n" + data
                while data:
                    data = data[os.write(handle, data) :]
                os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise StorageError(f"cannot write feedback to {path}: {error}") from error


def read_feedback(*paths: str | Path) -> tuple[list[Feedback], list[str]]:
    """Every whole line of the files, and what was left out and why ("f.jsonl:8: cut off"). The same id counts once.

    Only a torn line is left out (its writer was killed); a whole line that is wrong is an error: ConfigError.
    """
    records: dict[str, Feedback] = {}
    left_out: list[str] = []
    for path in paths:
        if not Path(path).is_file():
            raise ConfigError(f"--feedback: there is no file {path}")
        for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                left_out.append(f"{place}: cut off or not JSON, left out ({type(error).__name__})")
                continue
            feedback = parse_feedback(record, place)
            if records.setdefault(feedback.feedback_id, feedback) != feedback:
                raise ConfigError(f"{place}: feedback_id {feedback.feedback_id} was used before, for something else")
    return [records[key] for key in sorted(records)], left_out


def checkpoint_sha(folder: str | Path) -> str:
    """Which weights a model folder holds: the sha256 over its safetensors files, in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def to_plain_records(records: Iterable[Feedback]) -> list[dict[str, Any]]:
    """As annotation tools exchange records: {"id", "fields", "responses", "metadata"}. Plain JSON, nothing else."""
    return [
        {
            "id": record.feedback_id,
            "fields": {"prompt": record.prompt, "completion": record.completion},
            "responses": {
                "verdict": record.verdict,
                "correction": record.correction,
                "rating": record.rating,
                "note": record.note,
            },
            "metadata": {
                name: value
                for name, value in asdict(record).items()
                if name not in ("feedback_id", "prompt", "completion", "verdict", "correction", "rating", "note")
            },
        }
        for record in records
    ]


def from_plain_records(records: Iterable[dict[str, Any]]) -> list[Feedback]:
    """The other way. Raises ConfigError, with the record's number."""
    feedback = []
    for number, record in enumerate(records, start=1):
        flat = {"feedback_id": record.get("id")}
        for part in ("fields", "responses", "metadata"):
            flat |= record.get(part, {})
        feedback.append(parse_feedback(flat, f"record {number}"))
    return feedback


@contextlib.contextmanager
def _locked(handle: int) -> Iterator[None]:
    """An exclusive lock on the open file; it ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows: one writer at a time is the user's promise there
        yield
        return
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)
