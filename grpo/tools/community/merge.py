"""Merge the rows of an archive with feedback about them.

    v1/  the archive                       data.jsonl  version.json
    v2/  v1 + all feedback up to now       data.jsonl  version.json (parent's hash, changes, rows left out with reasons)

Every version is derived from v1 and all feedback lines. So merging is idempotent, the order of lines does not matter,
and withdrawn feedback leaves no trace. A row contains the feedback about it, never its author:

    {"question": ..., "answer": "It is `tâge`.", "pair_id": 7, "origin": "feedback",
     "accepted": ["It is `tâge`."], "disallowed": ["It is `tâga`."]}
"""

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.errors import ConfigError, StorageError
from grpo.tools.community.feedback import Feedback

Row = dict[str, Any]
Key = tuple[str, Any]
"""Subject of a line of feedback: ("pair", pair_id) or ("prompt", text)."""


@dataclass
class Merged:
    """The rows of the next version, and the contents of its record."""

    rows: list[Row]
    counts: Counter[str] = field(default_factory=Counter)
    changes: list[dict[str, Any]] = field(default_factory=list)
    """{"pair_id": 7, "change": "corrected", "votes": 2}, sorted; without names and texts."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """Rows whose corrections have no majority: their answer stays."""
    used: list[str] = field(default_factory=list)
    """feedback_ids in the rows, sorted."""
    withdrawn: list[str] = field(default_factory=list)


def merge(base: list[Row], feedback: Iterable[Feedback], question: str = "question", answer: str = "answer") -> Merged:
    """Apply all feedback to the archive's rows.

    A correction replaces the answer of its pair_id, or adds a row for a new question. Each reviewer has one vote per
    row, the latest. The answer with the most votes wins; a row with a tie is quarantined. Accepting a completion is a
    vote for it.

    Args:
        base: Rows of the archive, with "pair_id".
        feedback: All feedback lines, in any order.
        question: Name of the question's column.
        answer: Name of the answer's column.
    """
    records = sorted(feedback, key=lambda record: (record.created_at, record.feedback_id))
    kept, gone_pairs, withdrawn = _without_withdrawn(records)
    merged = Merged([], withdrawn=sorted(withdrawn))
    merged.counts["withdrawn"] = len(withdrawn)
    merged.counts["without_consent"] = sum(not record.consent for record in kept)
    about = _by_subject(base, [record for record in kept if record.consent], question, merged)
    for row in base:
        if row.get("pair_id") in gone_pairs:
            merged.counts["rows_withdrawn"] += 1
            continue
        records_here = about.pop(("pair", row.get("pair_id")), [])
        merged.rows.append(_applied(row, records_here, merged, answer))
    for (_, prompt), records_here in sorted(about.items()):  # only new questions are left
        pair_id = "community-" + hashlib.sha256(str(prompt).encode()).hexdigest()[:12]
        row = _applied({question: prompt, answer: None, "pair_id": pair_id}, records_here, merged, answer)
        if row[answer] is not None:
            merged.rows.append(row)
            merged.counts["added"] += 1
    merged.changes.sort(key=lambda change: str(change["pair_id"]))
    return merged


def _by_subject(base: list[Row], records: list[Feedback], question: str, merged: Merged) -> dict[Key, list[Feedback]]:
    """Group feedback by the row or the new question it is about."""
    known = {row.get("pair_id") for row in base}
    by_question = {_nfc(str(row.get(question, ""))): row.get("pair_id") for row in base}
    about: dict[Key, list[Feedback]] = {}
    for record in records:
        pair_id = record.pair_id if record.pair_id in known else by_question.get(_nfc(record.prompt))
        if record.pair_id is not None and pair_id is None:
            merged.counts["unknown_pair_id"] += 1
            continue
        key = ("pair", pair_id) if pair_id is not None else ("prompt", _nfc(record.prompt))
        about.setdefault(key, []).append(record)
        merged.used.append(record.feedback_id)
    merged.used.sort()
    return about


def _without_withdrawn(records: list[Feedback]) -> tuple[list[Feedback], set[Any], set[str]]:
    """Return the valid records, pair_ids to remove from the data, and revoked feedback_ids.

    Args:
        records: In order of time.
    """
    withdrawals = [record for record in records if record.verdict == "withdraw"]
    gone = {w.pair_id for w in withdrawals if w.pair_id is not None and w.reviewer == "anonymous" and not w.withdraws}
    kept: list[Feedback] = []
    withdrawn: set[str] = set()
    for record in records:
        if record.verdict == "withdraw":
            continue
        if any(_revokes(withdrawal, record) for withdrawal in withdrawals):
            withdrawn.add(record.feedback_id)
        else:
            kept.append(record)
    return kept, gone, withdrawn


def _revokes(withdrawal: Feedback, record: Feedback) -> bool:
    if withdrawal.withdraws:
        return withdrawal.withdraws == record.feedback_id
    if record.created_at > withdrawal.created_at:
        return False  # given again after the withdrawal
    if withdrawal.pair_id is not None:
        same_reviewer = withdrawal.reviewer in ("anonymous", record.reviewer)
        return withdrawal.pair_id == record.pair_id and same_reviewer
    return withdrawal.reviewer == record.reviewer


def _applied(row: Row, records: list[Feedback], merged: Merged, answer: str) -> Row:
    """Return the row with the feedback about it, and count and record the change in `merged`."""
    before = None if row[answer] is None else str(row[answer])
    votes: dict[str, str] = {}
    rejected: set[str] = set()
    for record in records:
        merged.counts[record.verdict] += 1
        if record.verdict == "reject":
            rejected.add(_nfc(record.completion))
            continue
        said = record.correction if record.verdict == "correct" else record.completion
        votes[record.reviewer] = _nfc(str(said))
        if record.verdict == "correct" and record.completion.strip():
            rejected.add(_nfc(record.completion))
    tally = Counter(votes.values())
    corrected = {_nfc(str(record.correction)) for record in records if record.verdict == "correct"}
    best = sorted(tally.items(), key=lambda item: (-item[1], item[0]))
    new = dict(row)
    if len(best) > 1 and best[0][1] == best[1][1] and best[0][0] != best[1][0] and corrected:
        merged.quarantined.append({"pair_id": row.get("pair_id"), "answers": len(best), "votes": best[0][1]})
        merged.counts["quarantined"] += 1
    elif best and best[0][0] in corrected | ({best[0][0]} if before is None else set()):
        new[answer] = best[0][0]
        if before is None or _nfc(before) != best[0][0]:
            change = "added" if before is None else "corrected"
            merged.changes.append({"pair_id": row.get("pair_id"), "change": change, "votes": best[0][1]})
    changed = new[answer] is not None and (before is None or _nfc(before) != _nfc(str(new[answer])))
    now = set() if new[answer] is None else {_nfc(str(new[answer]))}
    accepted = {text for text in tally if text not in corrected} | (now if records else set())
    if changed and before is not None:
        rejected.add(_nfc(before))
    new["origin"] = "feedback" if changed else row.get("origin", "base")
    new["accepted"] = sorted(accepted)
    new["disallowed"] = sorted(rejected - accepted - now)
    return new


def write_version(root: str | Path, merged: Merged, source: dict[str, Any] | None = None) -> tuple[Path, bool]:
    """Write the next version, unless the newest one is the same.

    Older versions that contain feedback withdrawn since lose their data, and their record says so.

    Returns:
        The version's folder, and whether it is new.

    Raises:
        StorageError: The version cannot be written.
    """
    root = Path(root)
    versions = versions_in(root)
    text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in merged.rows)
    sha = hashlib.sha256(text.encode()).hexdigest()
    try:
        _delete_withdrawn(versions, set(merged.withdrawn))
        if versions:
            newest = json.loads((versions[-1] / "version.json").read_text(encoding="utf-8"))
            if newest["sha256"] == sha and newest["feedback_ids"] == merged.used and "withdrawn" not in newest:
                return versions[-1], False
        folder = root / f"v{len(versions) + 1}"
        record = {
            "version": len(versions) + 1,
            "parent": json.loads((versions[-1] / "version.json").read_text())["sha256"] if versions else None,
            "sha256": sha,
            "rows": len(merged.rows),
            "counts": {name: count for name, count in sorted(merged.counts.items()) if count},
            "changes": merged.changes,
            "quarantined": merged.quarantined,
            "feedback_ids": merged.used,
            **({"source": source} if source else {}),
        }
        temporary = root / f".v{len(versions) + 1}"
        temporary.mkdir(parents=True, exist_ok=True)
        (temporary / "data.jsonl").write_text(text, encoding="utf-8")
        (temporary / "version.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, folder)
    except OSError as error:
        raise StorageError(f"cannot write a version of the data to {root}: {error}") from error
    return folder, True


def versions_in(root: str | Path) -> list[Path]:
    """Return the folders v1, v2, ..., oldest first."""
    found = [path for path in Path(root).glob("v*") if path.name[1:].isdigit() and (path / "version.json").is_file()]
    return sorted(found, key=lambda path: int(path.name[1:]))


def read_rows_of(version: str | Path) -> list[Row]:
    """Return the rows of one version. Raises ConfigError if they were withdrawn, or changed after they were written."""
    folder = Path(version)
    record = json.loads((folder / "version.json").read_text(encoding="utf-8"))
    if "withdrawn" in record:
        raise ConfigError(f"{folder}: its data was withdrawn; use a later version")
    content = (folder / "data.jsonl").read_bytes()
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise ConfigError(f"{folder / 'data.jsonl'} was changed after it was written: delete {folder} and merge again")
    return [json.loads(line) for line in content.decode("utf-8").splitlines()]


def _delete_withdrawn(versions: list[Path], withdrawn: set[str]) -> None:
    """Delete the data of versions that contain withdrawn feedback."""
    for folder in versions:
        record = json.loads((folder / "version.json").read_text(encoding="utf-8"))
        if "withdrawn" in record or not withdrawn & set(record["feedback_ids"]):
            continue
        (folder / "data.jsonl").unlink(missing_ok=True)
        record = {
            "version": record["version"],
            "parent": record["parent"],
            "sha256": record["sha256"],
            "withdrawn": True,
        }
        temporary = folder / ".version.json"
        temporary.write_text(json.dumps(record | {"feedback_ids": []}, indent=1), encoding="utf-8")
        os.replace(temporary, folder / "version.json")


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()
