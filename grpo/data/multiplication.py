"""Dataset multiplication: products of a three-digit and a two-digit number, which a tiny model cannot compute.

    question  What is 472 * 38?
    answer    472 * 38 = 17936
              #### 17936

A model can learn to copy the numbers into a call of a calculator (docs/tools.md). A hash of the question decides which
problems are held out.
"""

import random

from grpo.config.schema import DataConfig
from grpo.data.arithmetic import HELD_OUT_SIZE, TRAIN_SIZE, is_held_out
from grpo.data.files import Row, Table, table_of
from grpo.data.registry import Part, check_generated, register_dataset

FIRST, SECOND = (400, 999), (30, 99)
"""Ranges of the factors. All products have five digits, so that a tiny model can learn where to copy them from."""


@register_dataset("multiplication", check=check_generated)
def multiplication(data: DataConfig, part: Part, seed: int) -> Table:
    """Return 4000 training problems, or data.eval_size held-out ones. No download."""
    held_out_size = HELD_OUT_SIZE if data.eval_size is None else data.eval_size
    rows: list[Row] = generate_products(TRAIN_SIZE if part == "train" else held_out_size, seed=seed, split=part)
    return table_of("multiplication", rows)


def generate_products(count: int, *, seed: int, split: Part) -> list[dict[str, str]]:
    """Return `count` different problems: question and answer. The same seed gives the same problems."""
    rng = random.Random(f"multiplication {split} {seed}")
    problems: dict[str, str] = {}
    while len(problems) < count:
        a, b = rng.randint(*FIRST), rng.randint(*SECOND)
        question = f"What is {a} * {b}?"
        if is_held_out(question) == (split == "held_out"):
            problems.setdefault(question, f"{a} * {b} = {a * b}\n#### {a * b}")
    return [{"question": question, "answer": answer} for question, answer in problems.items()]
