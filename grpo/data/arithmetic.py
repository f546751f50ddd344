"""Dataset arithmetic: generated word problems in GSM8K's format, with worked answers that end in `#### N`.

    question  Tom has 3 apples. Tom buys 4. Tom loses 2. Tom finds 4. Tom drops 1. How many apples now?
    answer    3+4=7
              7-2=5
              5+4=9
              9-1=8
              #### 8

Every step is a one-digit fact, so a small model can learn to compute the answer line by line, but not at once. A hash
of the question decides which problems are held out, so that the two parts never share one.
"""

import random

from grpo.config.schema import DataConfig
from grpo.data.files import Table
from grpo.data.generated import generated_rows, generated_table
from grpo.data.registry import Part, check_generated, register_dataset

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
def arithmetic(data: DataConfig, part: Part, seed: int) -> Table:
    """Return 4000 training problems, or data.eval_size held-out ones. No download."""
    return generated_table("arithmetic", generate_problems, data, part, seed)


def generate_problems(count: int, *, seed: int, split: Part) -> list[dict[str, str]]:
    """Return `count` different problems: question and worked answer. The same seed gives the same problems."""
    return generated_rows("arithmetic", _problem, count, seed=seed, split=split)


def _problem(rng: random.Random) -> tuple[str, str]:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    total = rng.randint(1, MAX_NUMBER)
    sentences = [f"{name} has {total} {item}."]
    lines = []
    for _ in range(STEPS):
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
