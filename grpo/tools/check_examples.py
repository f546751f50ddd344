"""Worked examples as completions: what the rewards pay for the answers that every prompt shows."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.config.schema import DataConfig
from grpo.data.extractors import EXTRACTORS
from grpo.data.files import read_table
from grpo.data.prompts import EXAMPLE_ANSWER, EXAMPLE_QUESTION, messages_for, worked_examples
from grpo.data.rows import Example
from grpo.rewards.scoring import RewardSum
from grpo.tools.check_result import Check
from grpo.tools.check_rewards import probe_group, score_in_process

MARKED = ("hash", "xml", "boxed")
"""Extractors that read a gold answer out of a whole completion."""


@dataclass(frozen=True)
class ShownAnswer:
    """A worked example: the text that the prompt shows as an answer, and the row that it answers."""

    place: str
    row: Example
    text: str


def check_examples(found: Check, score: RewardSum, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of worked examples that would earn nothing as completions: the prompt teaches a form that is not paid.

    Call it after `check_rewards`. Examples without a gold answer are left out.
    """
    shown = shown_answers(data)
    if not shown:
        return
    groups = {
        "shown": [probe_group(one.row, one.text, tokenizer) for one in shown],
        "empty": [probe_group(one.row, "", tokenizer) for one in shown],
    }
    paid: dict[str, list[float]] = {"shown": [0.0] * len(shown), "empty": [0.0] * len(shown)}
    unread = []
    for name, weight in score.weights.items():
        scored = score_in_process(name, score, groups)
        if weight == 0 or scored.problem is not None:
            continue
        values = {kind: [value or 0.0 for value in scored.scores[kind]] for kind in groups}
        for kind, of_kind in values.items():
            paid[kind] = [total + weight * value for total, value in zip(paid[kind], of_kind, strict=True)]
        on_probes = found.rewards[name].scores
        right, wrong = on_probes["gold"] or 0.0, on_probes["wrong"] or 0.0
        if weight > 0 and right > wrong and not _is_more(values["shown"], values["empty"]):
            unread.append(
                f"'{name}' does not read the form of the worked examples: it pays {_mean(values['shown']):.3f} for "
                f"them, {right:.3f} in the form '{found.form}'"
            )
    pairs = zip(shown, paid["shown"], paid["empty"], strict=True)
    unpaid = [one.place for one, of_shown, of_empty in pairs if not of_shown > of_empty]
    if not unpaid and not unread:
        return
    if unpaid:
        unread.insert(0, f"{', '.join(unpaid)}: the answer that the prompt shows earns no more than an empty one")
    found.warnings.append(". ".join([*unread, _advice(data, found.form)]))


def _advice(data: DataConfig, form: str) -> str:
    if form.startswith("xml") and data.system_prompt != "xml":
        return (
            "Set --data.system_prompt xml, which shows them in <reasoning> and <answer> tags, or write them so in a "
            "column 'completion'"
        )
    written = f"in the form {form!r}" if form else "so"
    return f"Write them {written} in a column 'completion', or choose rewards that read their form"


def shown_answers(data: DataConfig) -> list[ShownAnswer]:
    """Return the worked examples of the prompt that have a gold answer: of data.examples and data.one_shot."""
    rows: list[dict[str, Any]] = []
    if data.examples:
        rows = read_table(data.examples, "data.examples").rows if isinstance(data.examples, str) else data.examples
    shown = []
    for number, (row, (question, text)) in enumerate(zip(rows, worked_examples(data), strict=True), start=1):
        gold = _gold(row, text, data)
        if gold is not None:
            columns = {**row, "question": question, "answer": gold}
            if str(row.get(data.answer) or gold) != gold:
                columns["solution"] = str(row[data.answer])
            messages = messages_for(question, data)
            shown.append(ShownAnswer(f"data.examples, row {number}", Example(messages, columns), text))
    if data.one_shot:
        messages = messages_for(EXAMPLE_QUESTION, data)
        place = [message["content"] for message in messages].index(EXAMPLE_QUESTION)
        own = Example(messages, {"question": EXAMPLE_QUESTION, "answer": EXAMPLE_ANSWER})
        shown.append(ShownAnswer("data.one_shot", own, str(messages[place + 1]["content"])))
    return shown


def _gold(row: dict[str, Any], text: str, data: DataConfig) -> str | None:
    """Return the gold answer of an example's answer column, else of the completion."""
    if row.get(data.answer) is not None:
        return EXTRACTORS[data.extractor](str(row[data.answer]))
    return next(filter(None, (EXTRACTORS[name](text) for name in MARKED)), None)


def _is_more(values: list[float], others: list[float]) -> bool:
    return any(value > other for value, other in zip(values, others, strict=True))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
