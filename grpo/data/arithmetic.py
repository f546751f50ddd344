"""Dataset arithmetic: generated word problems in GSM8K's format, with worked answers that end in `#### N`.

    question  Tom has 3 apples. Tom buys 4. Tom loses 2. Tom finds 4. Tom drops 1. How many apples now?
    answer    3+4=7
              7-2=5
              5+4=9
              9-1=8
              #### 8

Every step is a one-digit fact, so a small model can learn to compute the answer line by line, but not at once. A hash
of the question decides which problems are held out, so that the two parts never share one.

With `data.dataset_kwargs: {easier_rows: N}` and `data.shuffle_dataset: false`, training begins with N problems of one
step, then N of two and N of three. Held-out problems always have four.
"""

import random
from functools import partial

from grpo.config.schema import DataConfig
from grpo.data.files import Table, table_of
from grpo.data.generated import TRAIN_SIZE, generated_rows, generated_table
from grpo.data.registry import Part, check_generated, register_dataset
from grpo.errors import ConfigError

NAMES = ["Tom", "Anna", "Ben", "Mia", "Sam", "Lea", "Max", "Eva"]
ITEMS = ["apples", "books", "coins", "cards", "pens", "shells", "stamps", "marbles"]
GAINS = ["buys", "finds", "gets", "wins"]
LOSSES = ["loses", "sells", "drops", "breaks"]
STEPS = 4
MAX_NUMBER = 5
"""Largest number in a question; the smallest is 1."""
MAX_TOTAL = 9
"""Largest running total: one digit."""


@register_dataset("arithmetic", check=check_generated)
def arithmetic(data: DataConfig, part: Part, seed: int, *, easier_rows: int = 0) -> Table:
    """Return 4000 training problems, or data.eval_size held-out ones. No download.

    Args:
        easier_rows: Before the training problems, this many of one step, of two and of three.

    Raises:
        ConfigError: easier_rows is not a count, or the rows would be shuffled.
    """
    if isinstance(easier_rows, bool) or not isinstance(easier_rows, int) or easier_rows < 0:
        raise ConfigError(f"data.dataset_kwargs.easier_rows is {easier_rows!r}, it must be a number of rows")
    if easier_rows and data.shuffle_dataset:
        raise ConfigError(
            "data.dataset_kwargs.easier_rows puts easier problems first, but the rows are shuffled: set "
            "data.shuffle_dataset false"
        )
    if part == "held_out" or not easier_rows:
        return generated_table("arithmetic", generate_problems, data, part, seed)
    easier = [
        row
        for steps in range(1, STEPS)
        for row in generated_rows(
            f"arithmetic {steps}", partial(_problem, steps=steps), easier_rows, seed=seed, split=part
        )
    ]
    return table_of("arithmetic", [*easier, *generate_problems(TRAIN_SIZE, seed=seed, split=part)])


def generate_problems(count: int, *, seed: int, split: Part) -> list[dict[str, str]]:
    """Return `count` different problems: question and worked answer. The same seed gives the same problems."""
    return generated_rows("arithmetic", _problem, count, seed=seed, split=split)


def _problem(rng: random.Random, steps: int = STEPS) -> tuple[str, str]:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    total = rng.randint(1, MAX_NUMBER)
    sentences = [f"{name} has {total} {item}."]
    lines = []
    for _ in range(steps):
        number = rng.randint(1, MAX_NUMBER)
        gain = total + number <= MAX_TOTAL and (total < number or rng.random() < 0.5)
        if not gain and total < number:  # neither fits: lose at most the total
            number = rng.randint(1, total)
        verb = rng.choice(GAINS if gain else LOSSES)
        sentences.append(f"{name} {verb} {number}.")
        after = total + number if gain else total - number
        lines.append(f"{total}{'+' if gain else '-'}{number}={after}")
        total = after
    sentences.append(f"How many {item} now?")
    return " ".join(sentences), "\n".join([*lines, f"#### {total}"])
