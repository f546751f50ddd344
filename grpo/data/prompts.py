"""Messages: a question -> system prompt, worked examples and question.

system     Respond in the following format: ...      data.system_prompt
user       Tom has 2 pens. Tom buys 3. ...           data.examples, row 1
assistant  <reasoning> 2+3=5 </reasoning> ...
user       Anna has 4 cards. Anna sells 1. ...       the row's question
"""

import functools
import json
from pathlib import Path
from typing import Any

from grpo.config.schema import DataConfig
from grpo.data.extractors import EXTRACTORS
from grpo.data.files import read_table
from grpo.errors import ConfigError
from grpo.types import Message

SYSTEM_PROMPT = """Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""

EXAMPLE_QUESTION = "A box holds 6 pencils. Nina buys 4 boxes and gives 5 pencils away. How many pencils are left?"
EXAMPLE_REASONING = "4 boxes hold 4 * 6 = 24 pencils. After giving away 5, 24 - 5 = 19 are left."
EXAMPLE_ANSWER = "19"
MAX_EXAMPLES = 32
"""Rows of data.examples at most: all of them are in every prompt."""


def messages_for(question: str, data: DataConfig) -> list[Message]:
    """Return the messages for one question, with data.system_prompt, data.one_shot and data.examples."""
    messages: list[Message] = []
    xml = data.system_prompt == "xml"
    if data.system_prompt:
        messages.append({"role": "system", "content": SYSTEM_PROMPT if xml else data.system_prompt})
    if data.one_shot:
        shown = _tagged(EXAMPLE_REASONING, EXAMPLE_ANSWER)
        # The example uses the tags only if the system prompt has introduced them.
        content = shown if xml else f"{EXAMPLE_REASONING}\n{EXAMPLE_ANSWER}"
        messages.append({"role": "user", "content": EXAMPLE_QUESTION})
        messages.append({"role": "assistant", "content": content})
    for asked, shown in worked_examples(data):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": shown}]
    messages.append({"role": "user", "content": question})
    return messages


def worked_examples(data: DataConfig) -> list[tuple[str, str]]:
    """Return question and completion of each row of data.examples.

    The completion is the row's `completion` as it is, else the answer column. With the "xml" system prompt the answer
    column becomes <reasoning> and <answer> blocks: the reasoning is the row's `reasoning`, or what the answer column
    says before the gold answer.

    Raises:
        ConfigError: A row cannot be used; the message names it.
    """
    if not data.examples:
        return []
    settings = (data.question, data.answer, data.extractor, data.system_prompt == "xml")
    if isinstance(data.examples, str):
        path = Path(data.examples).expanduser()
        stamp = path.stat().st_mtime_ns if path.is_file() else 0
        return list(_examples_in_file(data.examples, stamp, settings))
    return list(_examples_in_config(json.dumps(data.examples, ensure_ascii=False, default=str), settings))


def shown_examples(data: DataConfig) -> list[dict[str, str]] | None:
    """Return data.examples as rows that no longer depend on a file or on other settings: question and completion."""
    if not data.examples:
        return None
    return [{data.question: asked, "completion": shown} for asked, shown in worked_examples(data)]


@functools.lru_cache(maxsize=8)
def _examples_in_file(path: str, stamp: int, settings: tuple[str, str, str, bool]) -> tuple[tuple[str, str], ...]:
    table = read_table(path, "data.examples")
    return _examples(table.rows, table.places, settings)


@functools.lru_cache(maxsize=8)
def _examples_in_config(rows: str, settings: tuple[str, str, str, bool]) -> tuple[tuple[str, str], ...]:
    read = json.loads(rows)
    return _examples(read, [f"data.examples, row {number}" for number in range(1, len(read) + 1)], settings)


def _examples(
    rows: list[dict[str, Any]], places: list[str], settings: tuple[str, str, str, bool]
) -> tuple[tuple[str, str], ...]:
    if len(rows) > MAX_EXAMPLES:
        raise ConfigError(
            f"data.examples has {len(rows)} rows, at most {MAX_EXAMPLES} are allowed: each of them is shown before "
            f"every question. Give a file with a few rows"
        )
    return tuple(_example(row, place, *settings) for row, place in zip(rows, places, strict=True))


def _example(row: dict[str, Any], place: str, question: str, answer: str, extractor: str, xml: bool) -> tuple[str, str]:
    there = ", ".join(row) or "none"
    for column in (question,) if "completion" in row else (question, answer):
        if not str(row.get(column) or "").strip():
            raise ConfigError(
                f"{place}: a worked example needs the column '{column}' (columns there: {there}), as the data has it: "
                f"add it, or set data.question and data.answer"
            )
    if "completion" in row:
        return str(row[question]), str(row["completion"])
    text = str(row[answer]).strip()
    reasoning = str(row.get("reasoning") or "").strip()
    if not xml:
        return str(row[question]), f"{reasoning}\n{text}" if reasoning else text
    if extractor == "xml" and not reasoning:  # the answer column is a finished completion
        return str(row[question]), f"{text}\n"
    gold = EXTRACTORS[extractor](text)
    if gold is None:
        raise ConfigError(
            f"{place}: data.extractor {extractor} finds no answer in {text[:120]!r}: write the example as the data's "
            f"rows are"
        )
    if not reasoning:
        reasoning = text.rpartition("####")[0].strip() if extractor == "hash" else text
        if reasoning in ("", gold):
            raise ConfigError(
                f"{place}: the example shows the answer {gold!r} without a reasoning, which system_prompt xml asks "
                f"for: add a column 'reasoning', or 'completion' with the whole text to show"
            )
    return str(row[question]), _tagged(reasoning, gold)


def _tagged(reasoning: str, answer: str) -> str:
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>\n"
