"""Data: config -> raw rows -> Examples, each a question as messages with the gold answer and every other column."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.config.schema import DataConfig
from grpo.data import sources  # noqa: F401  (importing it registers its datasets)
from grpo.data.extractors import EXTRACTORS, LOOKS_LIKE
from grpo.data.files import BadRows, Row, Table, table_of
from grpo.data.prompts import SYSTEM_PROMPT, messages_for
from grpo.data.registry import DATASETS, register_dataset
from grpo.data.sources import Part
from grpo.errors import ConfigError
from grpo.types import Message

__all__ = ["DATASETS", "SYSTEM_PROMPT", "BadRows", "Example", "extraction_report", "load_examples", "register_dataset"]

RESERVED = ("prompts", "completions", "completion_ids")
"""Rewards get these as arguments, so a column of that name could never reach them."""


@dataclass(frozen=True)
class Example:
    """One row, ready to be rendered."""

    messages: str | list[Message]
    """Chat messages, or plain text where the row has a `prompt` column of plain text."""
    columns: dict[str, Any] = field(default_factory=dict)
    """question, answer (the extracted gold answer), solution (the answer column in full, where that says more), and
    every other column of the row, untouched."""


def load_examples(data: DataConfig, part: Part, seed: int, bad: BadRows | None = None) -> list[Example]:
    """The training or the held-out examples. No held-out source -> []. Raises ConfigError, with file and line.

    With data.bad_rows "skip", rows that cannot be used are left out and noted in `bad`.
    """
    bad = bad if bad is not None else BadRows()
    bad.skip = data.bad_rows == "skip"
    source = DATASETS.get(data.name)
    takes_bad = "bad" in inspect.signature(source).parameters
    loaded = source(data, part, seed, bad) if takes_bad else source(data, part, seed)
    table = loaded if isinstance(loaded, Table) else table_of(data.name, list(loaded))
    if part == "held_out":
        table = Table(table.source, table.rows[: data.eval_size], table.places[: data.eval_size])
    elif not table.rows:
        raise ConfigError(f"{table.source} is empty: dataset '{data.name}' gave no rows to train on")
    if all(isinstance(row, Example) for row in table.rows):
        return list(table.rows)  # type: ignore[arg-type]  # A dataset of one's own may build its Examples itself.
    examples = load_rows(table, data, bad)
    if not examples and part == "train":
        raise ConfigError(f"{table.source}: none of its {len(table.rows)} rows can be used: {bad.rejected[0]}")
    return examples


def load_rows(table: Table, data: DataConfig, bad: BadRows) -> list[Example]:
    """Raw rows -> Examples. Raises ConfigError as load_examples does."""
    answers = _gold_answers(table, data, bad)
    examples = []
    for row, place, answer in zip(table.rows, table.places, answers, strict=True):
        if answer is LEFT_OUT:
            continue
        try:
            examples.append(_example(row, answer, data))
        except RowError as error:
            bad.add(place, str(error), error)
    return examples


def example_of(row: Row, place: str, data: DataConfig, bad: BadRows) -> Example | None:
    """One row of a stream, or None for one that was rejected."""
    try:
        _check_columns(row, data)
        text = "" if row.get(data.answer) is None else str(row[data.answer])
        answer = EXTRACTORS[data.extractor](text)
        if answer is None and data.answer in row:
            raise RowError(f"no answer for extractor '{data.extractor}' in {text[:120]!r}")
        return _example(row, answer, data)
    except RowError as error:
        bad.add(place, str(error), error)
        return None


class RowError(Exception):
    """What is wrong with one row. Its place is known further up."""


LEFT_OUT = "\0"
"""Stands for the answer of a row that was rejected."""


def _gold_answers(table: Table, data: DataConfig, bad: BadRows) -> list[str | None]:
    """The extracted gold answer of every row; None only for rows of TRL prompts, which need not have one."""
    extract = EXTRACTORS.get(data.extractor)
    if extract is None:
        raise ConfigError(f"data.extractor is '{data.extractor}', it must be one of {', '.join(EXTRACTORS)}")
    texts: list[str] = []
    needed: list[bool] = []
    answers: list[str | None] = []
    for row, place in zip(table.rows, table.places, strict=True):
        try:
            _check_columns(row, data)
        except RowError as error:
            bad.add(place, str(error), error)
            texts.append("")
            needed.append(False)
            answers.append(LEFT_OUT)
            continue
        value = row.get(data.answer)
        texts.append("" if value is None else str(value))
        needed.append(data.answer in row)
        answers.append(extract(texts[-1]))
    missing = [index for index, answer in enumerate(answers) if answer is None and needed[index]]
    if not missing:
        return answers
    fits = f"extractor '{data.extractor}' ({LOOKS_LIKE[data.extractor]})"
    if len(missing) == sum(needed):
        counts = extraction_rates(texts)
        best = max(counts, key=lambda name: counts[name])
        advice = f"'{best}' fits {counts[best]}: set data.extractor {best}"
        if counts[best] == 0:
            advice = f"the column '{data.answer}' holds nothing: set data.answer to the one that holds the answer"
        raise ConfigError(f"{table.source}: 0 of {len(missing)} answers fit {fits}; {advice}")
    for index in missing:
        many = (
            f"; the same for {len(missing)} of {sum(needed)} rows: mend or remove them, set data.bad_rows skip, or set "
        )
        other = f"data.extractor to another of {', '.join(EXTRACTORS)}"
        bad.add(
            table.places[index], f"no answer for {fits} in {texts[index][:120]!r}{'' if bad.skip else many + other}"
        )
        answers[index] = LEFT_OUT
    return answers


def extraction_rates(texts: list[str]) -> dict[str, int]:
    """How many of these answer texts each extractor finds an answer in."""
    return {name: sum(extract(text) is not None for text in texts) for name, extract in EXTRACTORS.items()}


def extraction_report(examples: Sequence[Example], data: DataConfig, rejected: int = 0) -> str:
    """One line before any weight loads: rows used and left out, the extractor's rate, and what it makes of a row."""
    total = len(examples) + rejected
    line = f"data: {total} rows, {len(examples)} used" + (f", {rejected} left out (rejected.jsonl)" if rejected else "")
    first = examples[0].columns if examples else {}
    if first.get("answer") is None:
        return line
    found = sum(example.columns.get("answer") is not None for example in examples)
    shown = repr(str(first["answer"]))[:60]
    return f"{line}; extractor {data.extractor} found {found} of {total} answers ({found / total:.1%}), the first is {shown}"


def _check_columns(row: Row, data: DataConfig) -> None:
    there = ", ".join(row) or "none"
    for name in RESERVED:
        if name in row:
            raise RowError(f"a column may not be called '{name}', rewards get that name: rename it")
    if data.question not in row and "prompt" not in row:
        raise RowError(
            f"there is no column '{data.question}' (columns there: {there}): set data.question to the one "
            f"that holds the question"
        )
    for key, column, default in [
        ("pair_id", data.pair_id, "pair_id"),
        ("generated_at", data.generated_at, "generated_at"),
    ]:
        if column != default and column not in row:
            raise RowError(f"there is no column '{column}' (columns there: {there}): correct data.{key}")
    # A row of TRL's kind, with its finished prompt, may be for rewards that need no gold answer.
    if data.question in row and data.answer not in row:
        raise RowError(
            f"there is no column '{data.answer}' (columns there: {there}): set data.answer to the one that "
            f"holds the answer"
        )


def _example(row: Row, answer: str | None, data: DataConfig) -> Example:
    """Where the file has both, say, `gold` and `answer`, and data.answer is `gold`, then `gold` is the answer."""
    messages: str | list[Message]
    if data.question in row:
        question = row[data.question]
        if not isinstance(question, str) or not question.strip():
            raise RowError(f"column '{data.question}' is {question!r}, it must be a text that is not empty")
        messages = messages_for(question, data)
    else:
        messages = _trl_prompt(row["prompt"])
        question = messages if isinstance(messages, str) else messages[-1]["content"]
    used = (data.question, data.answer) if data.question in row else ("prompt", data.answer)
    columns = {name: value for name, value in row.items() if name not in used}
    for ours, theirs in (("pair_id", data.pair_id), ("generated_at", data.generated_at)):
        if theirs != ours and theirs in columns:
            columns[ours] = columns.pop(theirs)
    columns["question"] = question
    if data.answer in row:
        columns["answer"] = answer
        if str(row[data.answer]) != answer:
            columns.setdefault("solution", str(row[data.answer]))
    return Example(messages, columns)


def _trl_prompt(prompt: Any) -> str | list[Message]:
    """TRL's `prompt` column is finished: text or messages, to which no system prompt or example is added."""
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        return [{"role": message["role"], "content": message["content"]} for message in prompt]
    raise RowError(
        f"column 'prompt' is {str(prompt)[:120]!r}, it must be a text that is not empty, or a list of "
        f'{{"role": ..., "content": ...}}'
    )


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )
