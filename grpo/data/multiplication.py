"""Dataset multiplication: products of a three-digit and a two-digit number, which a tiny model cannot compute.

    question  What is 472 * 38?
    answer    472 * 38 = 17936
              #### 17936

A model can learn to copy the numbers into a call of a calculator (docs/tools.md). A hash of the question decides which
problems are held out.
"""

import random

from grpo.config.schema import DataConfig
from grpo.data.files import Table
from grpo.data.generated import generated_rows, generated_table
from grpo.data.registry import Part, check_generated, register_dataset

FIRST, SECOND = (400, 999), (30, 99)
"""Ranges of the factors. All products have five digits, so that a tiny model can learn where to copy them from."""


@register_dataset("multiplication", check=check_generated)
def multiplication(data: DataConfig, part: Part, seed: int) -> Table:
    """Return 4000 training problems, or data.eval_size held-out ones. No download."""
    return generated_table("multiplication", generate_products, data, part, seed)


def generate_products(count: int, *, seed: int, split: Part) -> list[dict[str, str]]:
    """Return `count` different problems: question and answer. The same seed gives the same problems."""
    return generated_rows("multiplication", _problem, count, seed=seed, split=split)


def _problem(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(*FIRST), rng.randint(*SECOND)
    return f"What is {a} * {b}?", f"{a} * {b} = {a * b}\n#### {a * b}"
