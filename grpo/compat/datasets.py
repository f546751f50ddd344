"""Datasets of TRL: a `prompt` column of text or messages -> Examples. Other columns go to the rewards unchanged."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo.compat.environments import EMPTY_PROMPT, GivenTurns
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
    turns: GivenTurns = field(default_factory=GivenTurns)
    """Tools and environments, which some rows name."""

    @property
    def rows(self) -> int | None:
        """Rows of the training data; None for a stream."""
        return None if self.streamed else len(self.train)

    def function(self) -> Callable[..., list[Example]]:
        """Return the function that the trainer calls for its rows, with `stream` where they are read as needed."""

        def rows(data: Any, part: Part, seed: int) -> list[Example]:
            if part == "held_out":
                return [example for examples in self.held_out.values() for example in examples]
            return list(examples_of(self.train, "train_dataset", self.turns))

        if self.streamed:
            rows.stream = lambda: examples_of(self.train, "train_dataset", self.turns)  # type: ignore[attr-defined]
        return rows

    def longest_prompt(self, tokenizer: Any, template: Any) -> int:
        """Return the number of tokens of the longest training or evaluation prompt (of a stream: of its first rows).

        Args:
            template: Arguments of the chat template, or None.
        """
        train = examples_of(self.train, "train_dataset", self.turns)
        if self.streamed:
            train = itertools.islice(train, MEASURED)
        evaluated = itertools.chain.from_iterable(self.held_out.values())
        examples = sorted(itertools.chain(train, evaluated), key=lambda example: -len(str(example.messages)))
        chosen = [(one.messages, (template or {}) | template_arguments(one.columns)) for one in examples[:MEASURED]]
        return max((len(prompt_token_ids(messages, tokenizer, given)) for messages, given in chosen), default=1)


def prompts_of(train: Any, evaluation: Any, turns: GivenTurns | None = None, placeholders: int = 0) -> Prompts:
    """Return the datasets of GRPOTrainer.

    Args:
        turns: Tools and environments.
        placeholders: Rows with an empty prompt that stand for a missing train_dataset, where one environment gives
            the prompts.

    Raises:
        ConfigError: They are none, or of another kind.
    """
    turns = turns or GivenTurns()
    if train is None and turns.factories and not turns.routed:
        if not placeholders:
            raise ConfigError("train_dataset is missing: set max_steps, where the environment gives the prompts")
        train = [{"prompt": EMPTY_PROMPT} for _ in range(placeholders)]
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
    held_out = {name: list(examples_of(one, "eval_dataset", turns)) for name, one in sets.items() if one is not None}
    return Prompts(train, held_out, streamed=not hasattr(train, "__len__"), turns=turns)


def examples_of(dataset: Iterable[Any], what: str, turns: GivenTurns | None = None) -> Iterator[Example]:
    """Yield the rows of a dataset as Examples.

    Args:
        dataset: Rows.
        what: Name of the dataset in messages.
        turns: Tools and environments. With environments, a row needs no prompt.

    Raises:
        ConfigError: A row has no usable prompt, or names no environment.
    """
    turns = turns or GivenTurns()
    for number, row in enumerate(dataset, 1):
        if "prompt" not in row and turns.factories:
            row = {**row, "prompt": EMPTY_PROMPT}
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
        if isinstance(messages, str) and (turns.tools or turns.factories):
            raise ConfigError(
                f"{what}, row {number}: the prompt is a text, but tools and environments need messages: write it as "
                f'[{{"role": "user", "content": ...}}]'
            )
        try:
            columns = turns.columns(row)
        except ConfigError as error:
            raise ConfigError(f"{what}, row {number}: {error}") from error
        yield Example(messages, {name: value for name, value in columns.items() if name not in NOT_PASSED})
