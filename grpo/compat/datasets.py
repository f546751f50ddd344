"""Datasets of TRL: a `prompt` column of text or messages -> Examples. Other columns go to the rewards unchanged."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grpo.data.registry import Part
from grpo.data.rendering import prompt_token_ids, template_arguments
from grpo.data.rows import Example, RowError, trl_prompt
from grpo.errors import ConfigError

NOT_PASSED = ("prompt", "completion", "completion_ids")
"""Columns that rewards do not get, as in TRL."""
IMAGES = ("image", "images")
MEASURED = 500
"""Longest prompts, by characters, that are tokenised to find the longest one; also the first rows of a stream."""


@dataclass(frozen=True)
class Prompts:
    """The datasets of a run as one registered dataset."""

    train: Any
    held_out: dict[str, list[Example]]
    """Name of the evaluation set -> its examples; "" for the only one."""
    streamed: bool

    @property
    def rows(self) -> int | None:
        """Rows of the training data; None for a stream."""
        return None if self.streamed else len(self.train)

    def function(self) -> Callable[..., list[Example]]:
        """Return the function that the trainer calls for its rows, with `stream` where they are read as needed."""

        def rows(data: Any, part: Part, seed: int) -> list[Example]:
            if part == "held_out":
                return [example for examples in self.held_out.values() for example in examples]
            return list(examples_of(self.train, "train_dataset"))

        if self.streamed:
            rows.stream = lambda: examples_of(self.train, "train_dataset")  # type: ignore[attr-defined]
        return rows

    def longest_prompt(self, tokenizer: Any, template: Any) -> int:
        """Return the number of tokens of the longest training or evaluation prompt (of a stream: of its first rows).

        Args:
            template: Arguments of the chat template, or None.
        """
        train = examples_of(self.train, "train_dataset")
        if self.streamed:
            train = itertools.islice(train, MEASURED)
        evaluated = itertools.chain.from_iterable(self.held_out.values())
        examples = sorted(itertools.chain(train, evaluated), key=lambda example: -len(str(example.messages)))
        chosen = [(one.messages, (template or {}) | template_arguments(one.columns)) for one in examples[:MEASURED]]
        return max((len(prompt_token_ids(messages, tokenizer, given)) for messages, given in chosen), default=1)


def prompts_of(train: Any, evaluation: Any) -> Prompts:
    """Return the datasets of GRPOTrainer.

    Raises:
        ConfigError: They are none, or of another kind.
    """
    if train is None:
        raise ConfigError("train_dataset is missing: pass a datasets.Dataset with a column 'prompt'")
    sets = dict(evaluation) if isinstance(evaluation, Mapping) else {"": evaluation}
    named = {f"eval_dataset {name}".strip(): one for name, one in sets.items()}
    for name, dataset in {"train_dataset": train, **named}.items():
        if isinstance(dataset, str | bytes | Mapping) or (dataset is not None and not isinstance(dataset, Iterable)):
            raise ConfigError(
                f"{name} is a {type(dataset).__name__}, needs to be a datasets.Dataset, an IterableDataset or a list "
                f"of rows"
            )
    held_out = {name: list(examples_of(one, "eval_dataset")) for name, one in sets.items() if one is not None}
    return Prompts(train, held_out, streamed=not hasattr(train, "__len__"))


def examples_of(dataset: Iterable[Any], what: str) -> Iterator[Example]:
    """Yield the rows of a dataset as Examples. Raises ConfigError for a row without a usable prompt."""
    for number, row in enumerate(dataset, 1):
        if "prompt" not in row:
            raise ConfigError(
                f"{what}, row {number}: there is no column 'prompt' (columns there: {', '.join(row)}): add one with "
                f"a text or a list of messages"
            )
        for name in IMAGES:
            if row.get(name) is not None:
                raise ConfigError(f"{what}, row {number} has the column '{name}': prompts must be text")
        try:
            messages = trl_prompt(row["prompt"])
        except RowError as error:
            raise ConfigError(f"{what}, row {number}: {error}") from error
        yield Example(messages, {name: value for name, value in row.items() if name not in NOT_PASSED})
