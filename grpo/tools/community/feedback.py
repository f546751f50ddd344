"""Feedback: judgements of answers, one JSON object each (grpo/tools/community/feedback_file.py stores them as lines).

    {"schema": 1, "feedback_id": "5f0c...", "created_at": "2026-01-31T10:00:00+00:00", "verdict": "correct",
     "pair_id": 7, "prompt": "How would you say 'stone' ...?", "completion": "It is `tâga`.",
     "correction": "It is `tâge`.", "rating": 4, "note": "my grandmother says it with e", "reviewer": "heron",
     "consent": true, "licence": "CC-BY-NC-4.0", "model_id": "outputs/run/final", "checkpoint_sha": "9b1c..."}

    {"schema": 1, "feedback_id": "77aa...", "created_at": "...", "verdict": "withdraw", "reviewer": "heron"}

A withdrawal revokes earlier lines: one line (`withdraws`: its feedback_id), a reviewer's lines about a pair_id, or all
lines of a reviewer. With a pair_id and no reviewer it also removes the row from the data. Writers (chat, dashboard,
imports) only append; all other files are derived from the lines. Texts are data and are never interpreted.
"""

import hashlib
import unicodedata
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from grpo.errors import ConfigError

SCHEMA = 1
Verdict = Literal["accept", "reject", "correct", "withdraw"]
VERDICTS = ("accept", "reject", "correct", "withdraw")
MAX_TEXT = 100_000
"""Characters in one field."""
REQUIRED_TEXTS = ("feedback_id", "created_at")
OPTIONAL_TEXTS = ["prompt", "completion", "note", "reviewer", "licence", "model_id", "checkpoint_sha", "withdraws"]


@dataclass(frozen=True)
class Feedback:
    """One person's judgement of one answer. Create it with `new_feedback`, which fills in the id and the time."""

    feedback_id: str
    created_at: str
    """UTC, ISO 8601."""
    verdict: Verdict
    prompt: str = ""
    completion: str = ""
    """The model's answer."""
    correction: str | None = None
    """The right answer: required for `correct`, excluded elsewhere."""
    pair_id: Any = None
    """The data row of the question; None for a question that is not in the data."""
    rating: int | None = None
    """1 to 5."""
    note: str = ""
    reviewer: str = "anonymous"
    """A pseudonym, never a real name."""
    consent: bool = False
    """Permission to train on it. Without it, a line is counted and never used."""
    licence: str = ""
    model_id: str = ""
    checkpoint_sha: str = ""
    withdraws: str = ""
    """With `withdraw` only: the feedback_id to revoke."""
    schema: int = SCHEMA


def new_feedback(verdict: Verdict, **fields: Any) -> Feedback:
    """Return a validated record with a new id and the current time. Raises ConfigError that names the field."""
    stamp = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    return parse_feedback(
        {"feedback_id": uuid.uuid4().hex, "created_at": stamp, "verdict": verdict, **fields}, "feedback"
    )


def parse_feedback(record: Any, place: str) -> Feedback:
    """Validate a JSON object and normalise its texts to NFC and its time to UTC.

    Args:
        record: The object.
        place: Where it came from ("file.jsonl:8"), for messages.

    Raises:
        ConfigError: A field is missing or wrong; the message names the place, the field and the fix.
    """
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
    for name in (*REQUIRED_TEXTS, *OPTIONAL_TEXTS):
        values[name] = _text(values, name, place)
    values["created_at"] = _utc(values["created_at"], place)
    values["reviewer"] = values["reviewer"].strip() or "anonymous"
    if not isinstance(values.get("consent", False), bool):
        raise ConfigError(f"{place}: consent is {values['consent']!r}, it must be true or false")
    rating = values.get("rating")
    if rating is not None and (type(rating) is not int or not 1 <= rating <= 5):
        raise ConfigError(f"{place}: rating is {rating!r}, it must be null or a whole number from 1 to 5")
    if not isinstance(values.get("pair_id"), str | int | None) or isinstance(values.get("pair_id"), bool):
        raise ConfigError(f"{place}: pair_id is {values['pair_id']!r}, it must be null, a number or a text")
    values["correction"] = _correction(values, place)
    if values["verdict"] != "withdraw" and not values["prompt"].strip():
        raise ConfigError(f"{place}: prompt is empty, feedback must contain the question")
    return Feedback(**values)


def _text(values: dict[str, Any], name: str, place: str) -> str:
    """Return a text field in NFC."""
    required = name in REQUIRED_TEXTS
    value = values.get(name, None if required else "")
    if not isinstance(value, str) or (required and not value):
        raise ConfigError(f"{place}: {name} is {value!r}, it must be a text")
    if len(value) > MAX_TEXT:
        raise ConfigError(f"{place}: {name} has {len(value)} characters, at most {MAX_TEXT} are accepted")
    return unicodedata.normalize("NFC", value)


def _utc(text: str, place: str) -> str:
    """Return a time in one format, so that times compare as texts. A time without a zone is UTC."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{place}: created_at is {text!r}, it must be an ISO 8601 time") from error
    if time.tzinfo is None:
        time = time.replace(tzinfo=timezone.utc)
    return time.astimezone(timezone.utc).isoformat(timespec="microseconds")


def _correction(values: dict[str, Any], place: str) -> str | None:
    """Return the correction, which verdict `correct` requires and every other one excludes."""
    correction, verdict = values.get("correction"), values["verdict"]
    if verdict != "correct":
        if correction:
            raise ConfigError(f"{place}: `correction` is given, but verdict is '{verdict}': make it 'correct'")
        return None
    if not isinstance(correction, str) or not correction.strip():
        raise ConfigError(f"{place}: verdict 'correct' needs the right answer in `correction`, got {correction!r}")
    return _text(values, "correction", place).strip()


def checkpoint_sha(folder: str | Path) -> str:
    """Return 16 hex digits of the sha256 over a folder's safetensors files, in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def to_plain_records(records: Iterable[Feedback]) -> list[dict[str, Any]]:
    """Convert to the JSON of annotation tools: {"id", "fields", "responses", "metadata"}."""
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
    """Convert from the JSON of annotation tools. Raises ConfigError with the record's number."""
    feedback = []
    for number, record in enumerate(records, start=1):
        flat = {"feedback_id": record.get("id")}
        for part in ("fields", "responses", "metadata"):
            flat |= record.get(part, {})
        feedback.append(parse_feedback(flat, f"record {number}"))
    return feedback
