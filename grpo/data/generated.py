"""Datasets that are generated: different problems, of which a hash of the question holds some out."""

import hashlib
import random
from collections.abc import Callable

from grpo.config.schema import DataConfig
from grpo.data.files import Row, Table, table_of
from grpo.data.registry import Part
from grpo.errors import ConfigError

TRAIN_SIZE = 4000
HELD_OUT_SIZE = 500
"""Held-out problems where data.eval_size is null, which means all elsewhere."""
MAX_REPEATS = 10_000
"""Draws in a row without a new problem after which there is taken to be none."""


def is_held_out(question: str) -> bool:
    """Return whether a question is held out: one in eight is, for every seed."""
    return hashlib.sha256(question.encode()).digest()[0] < 32


def generated_rows(
    name: str, draw: Callable[[random.Random], tuple[str, str]], count: int, *, seed: int, split: Part
) -> list[dict[str, str]]:
    """Return `count` different problems of one part. The same seed gives the same problems.

    Args:
        name: the dataset, a part of the seed.
        draw: returns a question and its worked answer.

    Raises:
        ConfigError: there are fewer.
    """
    rng = random.Random(f"{name} {split} {seed}")
    problems: dict[str, str] = {}
    repeats = 0
    while len(problems) < count:
        question, answer = draw(rng)
        if is_held_out(question) != (split == "held_out") or question in problems:
            repeats += 1
            if repeats > MAX_REPEATS:
                raise ConfigError(
                    f"dataset '{name}' has no more than {len(problems)} different problems for the {split} part, not "
                    f"{count}: lower data.eval_size"
                )
            continue
        problems[question] = answer
        repeats = 0
    return [{"question": question, "answer": answer} for question, answer in problems.items()]


def generated_table(
    name: str, rows: Callable[..., list[dict[str, str]]], data: DataConfig, part: Part, seed: int
) -> Table:
    """Return the table of `rows(count, seed=, split=)`: TRAIN_SIZE problems, or data.eval_size held-out ones."""
    held_out_size = HELD_OUT_SIZE if data.eval_size is None else data.eval_size
    found: list[Row] = rows(TRAIN_SIZE if part == "train" else held_out_size, seed=seed, split=part)
    return table_of(name, found)
