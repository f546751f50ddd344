"""Rows -> Examples: the question as messages, the gold answer, and every other column of the row."""

import inspect
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from grpo.config.schema import DataConfig
from grpo.data.extractors import EXTRACTORS, LOOKS_LIKE, extraction_rates
from grpo.data.files import BadRows, Row, Table, table_of
from grpo.data.prompts import messages_for, worked_examples
from grpo.data.registry import DATASETS, DatasetFunction, Part
from grpo.errors import ConfigError
from grpo.registry import check_arguments
from grpo.types import Message, question_of

RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments of every reward: a column of that name could not be passed on."""


@dataclass(frozen=True)
class Example:
    """One row before its prompt is tokenised."""

    messages: str | list[Message]
    """Chat messages, or plain text where the row has a `prompt` column of plain text."""
    columns: dict[str, Any] = field(default_factory=dict)
    """question, answer (the extracted gold answer), solution (the whole answer column, where it says more), and every
    other column of the row, unchanged."""


class RowError(Exception):
    """A row that cannot be used. The caller knows its place."""


def load_examples(data: DataConfig, part: Part, seed: int, bad: BadRows | None = None) -> list[Example]:
    """Load the training or the held-out examples.

    Args:
        bad: Collects rejected rows where data.bad_rows is "skip".

    Returns:
        The examples; [] where the dataset has no held-out part.

    Raises:
        ConfigError: A row cannot be used (named with file and line), or none can.
    """
    bad = bad if bad is not None else BadRows()
    bad.skip = data.bad_rows == "skip"
    source = DATASETS.get(data.name)
    names = list(inspect.signature(source).parameters)
    kwargs = _dataset_kwargs(data, source, names)
    loaded = source(data, part, seed, bad, **kwargs) if "bad" in names else source(data, part, seed, **kwargs)
    table = loaded if isinstance(loaded, Table) else table_of(data.name, list(loaded))
    if part == "held_out":
        table = Table(table.source, table.rows[: data.eval_size], table.places[: data.eval_size])
    elif not table.rows:
        raise ConfigError(f"{table.source} is empty: dataset '{data.name}' gave no rows to train on")
    if all(isinstance(row, Example) for row in table.rows):  # a custom dataset may build its Examples itself
        return [with_template_settings(example, data) for example in _checked_examples(table, bad)]
    examples = load_rows(table, data, bad)
    if not examples and part == "train":
        raise ConfigError(f"{table.source}: none of its {len(table.rows)} rows can be used: {bad.rejected[0]}")
    return examples


def _dataset_kwargs(data: DataConfig, source: DatasetFunction, names: list[str]) -> dict[str, Any]:
    """Return data.dataset_kwargs. Raises ConfigError for one that the dataset does not take, or that is missing."""
    label, key = f"data.name '{data.name}'", "data.dataset_kwargs"
    check_arguments(label, source, {*names[:3], "bad"}, data.dataset_kwargs, key, "data, part and seed")
    return data.dataset_kwargs


def _checked_examples(table: Table, bad: BadRows) -> list[Example]:
    """Reject finished Examples whose texts cannot be encoded."""
    examples: list[Example] = []
    for example, place in zip(table.rows, table.places, strict=True):
        assert isinstance(example, Example)
        broken = _broken_text(example.messages) or _broken_text(example.columns)
        if broken is None:
            examples.append(example)
        else:
            bad.add(place, f"it holds {broken!a}, half of a character (a lone surrogate), which is no text")
    return examples


def load_rows(table: Table, data: DataConfig, bad: BadRows) -> list[Example]:
    """Convert raw rows to Examples, without those of data.examples. Raises ConfigError as `load_examples` does."""
    extract = _extractor(data)
    shown = {question for question, _ in worked_examples(data)}
    answered: list[tuple[Row, str, str | None]] = []
    for row, place in zip(table.rows, table.places, strict=True):
        if row.get(data.question) in shown:  # its solution is in every prompt
            continue
        try:
            _check_columns(row, data)
            answered.append((row, place, extract(_answer_text(row, data))))
        except RowError as error:
            bad.add(place, str(error), error)
    _check_answers(table.source, answered, data, bad)
    examples = []
    for row, place, answer in answered:
        if answer is None and data.answer in row:  # rejected by _check_answers
            continue
        try:
            examples.append(_example(row, answer, data))
        except RowError as error:
            bad.add(place, str(error), error)
    return examples


def example_of(row: Row, place: str, data: DataConfig, bad: BadRows) -> Example | None:
    """Convert one row of a stream. Returns None for a row that is rejected, or is one of data.examples."""
    if any(row.get(data.question) == question for question, _ in worked_examples(data)):
        return None
    try:
        _check_columns(row, data)
        text = _answer_text(row, data)
        answer = _extractor(data)(text)
        if answer is None and data.answer in row:
            raise RowError(f"no answer for extractor '{data.extractor}' in {text[:120]!r}")
        return _example(row, answer, data)
    except RowError as error:
        bad.add(place, str(error), error)
        return None


def extraction_report(examples: Sequence[Example], data: DataConfig, rejected: int = 0) -> str:
    """Return one line: rows used and left out, the extractor's rate, and the first extracted answer."""
    total = len(examples) + rejected
    line = f"data: {total} rows, {len(examples)} used" + (f", {rejected} left out (rejected.jsonl)" if rejected else "")
    first = examples[0].columns if examples else {}
    if first.get("answer") is None:
        return line
    found = sum(example.columns.get("answer") is not None for example in examples)
    shown = repr(str(first["answer"]))[:60]
    rate = f"{found} of {total} answers ({found / total:.1%})"
    return f"{line}; extractor {data.extractor} found {rate}, the first is {shown}"


def _extractor(data: DataConfig) -> Callable[[str], str | None]:
    extract = EXTRACTORS.get(data.extractor)
    if extract is None:
        raise ConfigError(f"data.extractor is '{data.extractor}', it must be one of {', '.join(EXTRACTORS)}")
    return extract


def _answer_text(row: Row, data: DataConfig) -> str:
    """Return the answer column as text; "" where it is empty. Raises RowError for what is neither text nor a number."""
    value = row.get(data.answer)
    if value is not None and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a number of NumPy
        value = value.item()
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, Decimal) and value.is_finite():
        return f"{value:f}"
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise RowError(
        f"column '{data.answer}' is {str(value)[:120]} ({type(value).__name__}), it must be text or a finite number"
    )


def _check_answers(source: str, answered: list[tuple[Row, str, str | None]], data: DataConfig, bad: BadRows) -> None:
    """Reject the rows without a gold answer. Raises ConfigError if the extractor fits no row at all.

    Only rows of TRL prompts need not have an answer column.
    """
    needed = [found for found in answered if data.answer in found[0]]
    missing = [(row, place) for row, place, answer in needed if answer is None]
    if not missing:
        return
    fits = f"extractor '{data.extractor}' ({LOOKS_LIKE[data.extractor]})"
    if len(missing) == len(needed):
        counts = extraction_rates([_answer_text(row, data) for row, _, _ in answered])
        best = max(counts, key=lambda name: counts[name])
        advice = f"'{best}' fits {counts[best]}: set data.extractor {best}"
        if counts[best] == 0:
            advice = f"the column '{data.answer}' is empty: set data.answer to the one that holds the answer"
        raise ConfigError(f"{source}: 0 of {len(missing)} answers fit {fits}; {advice}")
    hint = (
        f"; the same for {len(missing)} of {len(needed)} rows: fix or remove them, set data.bad_rows skip, or set "
        f"data.extractor to another of {', '.join(EXTRACTORS)}"
    )
    for row, place in missing:
        bad.add(place, f"no answer for {fits} in {_answer_text(row, data)[:120]!r}{'' if bad.skip else hint}")


def _check_columns(row: Row, data: DataConfig) -> None:
    for name, value in row.items():
        if (broken := _broken_text(value) or _broken_text(name)) is not None:
            raise RowError(
                f"column {name!a} holds {broken!a}, half of a character (a lone surrogate), which is no text: an "
                f"emoji was cut in two. Write the data again, or leave such rows out with --data.bad_rows skip"
            )
    there = ", ".join(row) or "none"
    for name in RESERVED:
        if name in row:
            raise RowError(f"a column cannot be called '{name}', rewards get that argument: rename it")
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
    # A row with TRL's finished prompt may be for rewards that need no gold answer.
    if data.question in row and data.answer not in row:
        raise RowError(
            f"there is no column '{data.answer}' (columns there: {there}): set data.answer to the one that "
            f"holds the answer"
        )


def _broken_text(value: Any) -> str | None:
    """Return a lone surrogate in a text, or in the texts of a list or mapping; None without one."""
    if isinstance(value, str):
        found = None if value.isascii() else re.search("[\ud800-\udfff]", value)
        return found.group() if found else None
    items = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((broken for item in items if (broken := _broken_text(item)) is not None), None)


def _example(row: Row, answer: str | None, data: DataConfig) -> Example:
    """Build the Example. `data.answer` becomes the column `answer`, and replaces another one of that name."""
    messages: str | list[Message]
    if data.question in row:
        question = row[data.question]
        if not isinstance(question, str) or not question.strip():
            raise RowError(f"column '{data.question}' is {question!r}, it must be a text that is not empty")
        question = unicodedata.normalize("NFC", question)
        messages = messages_for(question, data)
    else:
        messages = trl_prompt(row["prompt"])
        question = question_of(messages)
    used = (data.question, data.answer) if data.question in row else ("prompt", data.answer)
    columns = {name: value for name, value in row.items() if name not in used}
    for ours, theirs in (("pair_id", data.pair_id), ("generated_at", data.generated_at)):
        if theirs != ours and theirs in columns:
            columns[ours] = columns.pop(theirs)
    columns["question"] = question
    if data.answer in row:
        columns["answer"] = answer
        text = _answer_text(row, data)
        if text != answer:
            columns.setdefault("solution", text)
    return with_template_settings(Example(messages, columns), data)


def with_template_settings(example: Example, data: DataConfig) -> Example:
    """Return the example with data.chat_template_kwargs in its column chat_template_kwargs, whose own values win."""
    own = example.columns.get("chat_template_kwargs")
    if not data.chat_template_kwargs or not (own is None or isinstance(own, dict)):
        return example
    settings = {**data.chat_template_kwargs, **(own or {})}
    return Example(example.messages, {**example.columns, "chat_template_kwargs": settings})


def trl_prompt(prompt: Any) -> str | list[Message]:
    """Check TRL's `prompt` column: text or messages, to which no system prompt or example is added."""
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        if prompt[-1]["role"] == "assistant" and not isinstance(prompt[-1]["content"], str):
            raise RowError("the last message of column 'prompt' is a tool call: there is no answer to sample after it")
        return [{key: value for key, value in message.items() if value is not None} for message in prompt]
    raise RowError(
        f"column 'prompt' is {str(prompt)[:120]!r}, it must be a text that is not empty, or a list of "
        f'{{"role": ..., "content": ...}}'
    )


def _is_message(message: Any) -> bool:
    if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))
