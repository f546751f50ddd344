"""Rollout reader: rollouts.jsonl -> the completions of one step, or those of many steps that meet a condition.

The columns of a prompt are in the first row of its group; readers get them in each. Steps only increase in the file, so
`rows_of_step` finds a step by bisection. `search` reads blocks from the end of the file, the newest step first, until
it has enough rows or its time is over.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]
Condition = Callable[[list[Row]], list[Row]]
"""Function that returns those of the given rows that a search should find."""

SEARCH_SECONDS = 2.0
"""Time limit of a search. It returns the rows found until then."""
_BLOCK = 1 << 20
"""Bytes that a search reads at a time."""

CORRECT = ("accuracy", "exact_match", "correctness")
"""Rewards that tell right answers from wrong ones. The first one that a run has counts."""


def rows_of_step(path: Path, step: int) -> list[Row]:
    """Return the rows of one step, after a bisection of about 30 short reads."""
    try:
        with path.open("rb") as file:
            file.seek(_first_at_least(file, step))
            return with_columns(_rows_while(file, step))
    except OSError:
        return []


def search(
    path: Path, newest: int, oldest: int, fits: Condition, most: int, seconds: float = SEARCH_SECONDS
) -> tuple[list[Row], int]:
    """Search rows from the end of the file, until `most` are found or `seconds` have passed.

    Args:
        path: rollouts.jsonl.
        newest, oldest: first and last step of the search.
        fits: condition of a row.

    Returns:
        At most `most` rows, the newest step first, and the oldest step that was searched.
    """
    found: list[Row] = []
    reached, until = newest, time.monotonic() + seconds
    try:
        with path.open("rb") as file:
            start, end = _first_at_least(file, oldest), _first_at_least(file, newest + 1)
            for lines in _blocks_back(file, start, end):
                rows = parse_rows(lines)
                if rows:
                    reached = int(rows[0].get("step", reached))
                    found = fits(rows) + found
                if len(found) >= most or time.monotonic() > until:
                    break
            else:
                reached = oldest
    except OSError:
        return [], newest
    found.sort(key=lambda row: -int(row.get("step", 0)))
    return _complete(path, found[:most]), reached


def with_columns(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with the columns of their prompt, which only its first row holds. Older runs have them in each.

    The rows of one step and draw must follow one another.
    """
    complete: list[Row] = []
    last: tuple[Any, Any] | None = None
    columns: Any = None
    for row in rows:
        if "columns" in row:
            last, columns = (row.get("step"), row.get("draw")), row["columns"]
        elif last == (row.get("step"), row.get("draw")):
            row = {**row, "columns": columns}
        complete.append(row)
    return complete


def _complete(path: Path, found: list[Row]) -> list[Row]:
    """Return found rows with the columns of their prompts, which may be in rows that were not found."""
    columns: dict[Any, Any] = {}
    for step in {row.get("step") for row in found if "columns" not in row}:
        for row in rows_of_step(path, step) if isinstance(step, int) else []:
            if "columns" in row:
                columns[step, row.get("draw")] = row["columns"]
    complete = []
    for row in found:
        key = (row.get("step"), row.get("draw"))
        complete.append({**row, "columns": columns[key]} if "columns" not in row and key in columns else row)
    return complete


def _blocks_back(file: BinaryIO, start: int, end: int) -> Iterator[list[bytes]]:
    """Yield the complete lines between two offsets in blocks, the last block first."""
    span = _BLOCK
    while end > start:
        begin = max(start, end - span)
        file.seek(begin)
        data = file.read(end - begin)
        skipped = 0 if begin == start else data.find(b"\n") + 1
        if begin > start and skipped in (0, len(data)):  # the line is longer than the block
            span *= 2
            continue
        yield data[skipped:].split(b"\n")
        end = begin + skipped


def last_step(path: Path) -> int | None:
    """Return the newest step that has a complete line; None if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            span = 1 << 16
            while True:
                file.seek(max(0, size - span))
                lines = file.read(span).split(b"\n")[:-1]
                for line in reversed(lines):
                    step = _step_of(line)
                    if step is not None:
                        return step
                if span >= size:
                    return None
                span *= 8
    except OSError:
        return None


def _first_at_least(file: BinaryIO, step: int) -> int:
    """Return the offset of the first line of `step` or a later step; the end of the file if there is none."""
    low, high = 0, (size := file.seek(0, os.SEEK_END))
    while low < high:
        middle = (low + high) // 2
        found = _line_after(file, middle)
        if found is None or found[1] >= step:
            high = middle
        else:
            low = max(middle + 1, found[0] + 1)
    found = _line_after(file, low)
    return found[0] if found is not None else size


def _line_after(file: BinaryIO, offset: int) -> tuple[int, int] | None:
    """Return (offset, step) of the first readable line that starts at or after `offset`; None if there is none."""
    file.seek(max(0, offset - 1))
    if offset:
        file.readline()  # to the start of the next line; if a line starts at `offset`, none is skipped
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            return None
        step = _step_of(line)
        if step is not None:
            return start, step


def _step_of(line: bytes) -> int | None:
    head = line[:40].partition(b",")[0]
    if head.startswith(b'{"step": '):
        try:
            return int(head.removeprefix(b'{"step": '))
        except ValueError:
            pass
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _rows_while(file: BinaryIO, step: int) -> Iterator[Row]:
    for line in file:
        found = _step_of(line)
        if found is None or not line.endswith(b"\n"):
            continue
        if found != step:
            return
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def is_correct(row: Row) -> bool | None:
    """Return True if the answer is right by the first reward of CORRECT; None if the run has none of them."""
    rewards = row.get("rewards")
    if not isinstance(rewards, dict):
        return None
    for name in CORRECT:
        value = rewards.get(name)
        if value is not None:
            return float(value) > 0
    return None


@dataclass(frozen=True)
class Judgement:
    """Rows in two classes, for their colours."""

    verdicts: list[bool | None]
    """Of each row; None where it is in neither class."""
    labels: tuple[str, str]
    """Names of the classes True and False."""


def judge(rows: list[Row]) -> Judgement:
    """Return which answers are right; by the reward where no reward of the run tells right from wrong.

    # rewards 0.2 0.4 0.9, no accuracy  ->  False False True: above and below the middle of 0.2 and 0.9
    """
    verdicts = [is_correct(row) for row in rows]
    rewards = [_reward(row) for row in rows]
    known = [reward for reward in rewards if math.isfinite(reward)]
    if any(verdict is not None for verdict in verdicts) or not known or min(known) == max(known):
        return Judgement(verdicts, ("right", "wrong"))
    middle = (min(known) + max(known)) / 2
    by_reward = [reward > middle if math.isfinite(reward) else None for reward in rewards]
    return Judgement(by_reward, (f"reward above {middle:.3g}", f"reward up to {middle:.3g}"))


def matching(
    rows: list[Row],
    *,
    text: str = "",
    correct: bool | None = None,
    lowest: float | None = None,
    highest: float | None = None,
) -> list[Row]:
    """Return the rows that meet all conditions.

    Args:
        rows: rows of rollouts.jsonl.
        text: part of the prompt or the completion, in any case.
        correct: value of `is_correct`; None = any.
        lowest, highest: limits of the reward; None = no limit.
    """
    wanted = text.casefold()
    return [
        row
        for row in rows
        if wanted in f"{row.get('prompt', '')}\n{whole_completion(row)}".casefold()
        and (correct is None or is_correct(row) is correct)
        and (lowest is None or _reward(row) >= lowest)
        and (highest is None or _reward(row) <= highest)
    ]


def whole_completion(row: Row) -> str:
    """Return the text of a completion; of several turns, all of them with their roles.

    [assistant, 21 tokens]
    <tool_call>{"name": "calculator", ...}</tool_call>
    [tool calculator]
    42
    [assistant, 6 tokens]
    It is 42.
    """
    messages = messages_of(row)
    if len(messages) < 2:
        return str(row.get("completion", ""))
    parts = []
    for message in messages:
        tokens = f", {message['tokens']} tokens" if "tokens" in message else ""
        name = f" {message['name']}" if message.get("name") else ""
        parts += [f"[{message.get('role')}{name}{tokens}]", str(message.get("content", "")).strip("\n")]
    return "\n".join(parts)


def messages_of(row: Row) -> list[dict[str, Any]]:
    """Return the messages of a completion of several turns. Empty: it has one."""
    turns = row.get("turns")
    found = turns.get("messages") if isinstance(turns, dict) else None
    return [message for message in found if isinstance(message, dict)] if isinstance(found, list) else []


def told_turns(row: Row) -> str:
    """Return "3 turns, 2 calls, 1 failed"; "" for a run without tools and environment."""
    messages = messages_of(row)
    if not messages:
        return ""
    count = sum(message.get("role") == "assistant" for message in messages)
    numbers = (row["turns"].get(name) for name in ("calls", "failures"))
    calls, failures = (number if isinstance(number, int) else 0 for number in numbers)
    parts = [f"{count} turn{'s' if count != 1 else ''}"]
    parts += [f"{calls} call{'s' if calls != 1 else ''}"] if calls else []
    return ", ".join([*parts, f"{failures} failed"] if failures else parts)


def groups_of(rows: list[Row]) -> dict[int, list[Row]]:
    """Return the rows by their prompt's draw, in the given order."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(int(row.get("draw", 0)), []).append(row)
    return groups


def _reward(row: Row) -> float:
    reward = row.get("reward")
    return float(reward) if isinstance(reward, (int, float)) else -math.inf


def parse_rows(lines: list[bytes]) -> list[Row]:
    """Parse the lines that hold a JSON object. Other lines are left out."""
    loads, rows = fast_json_loads(), []
    for line in lines:
        try:
            row = loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def fast_json_loads() -> Callable[[bytes], Any]:
    """Return orjson's loads if it is installed (gradio needs it; three times as fast), otherwise json's."""
    try:
        from orjson import loads
    except ImportError:
        return json.loads
    return loads
