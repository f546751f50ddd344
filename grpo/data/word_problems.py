"""Dataset word_problems: generated word problems of one step, with worked answers that end in `#### N`.

    question  Tom has 5 books. Tom buys 9 more. How many books does Tom have now?
    answer    5 + 9 = 14
              #### 14

A small pretrained model can solve them, and has to learn to answer in a format and to choose the operation. A hash of
the question decides which problems are held out, so that the two parts never share one.
"""

import random

from grpo.config.schema import DataConfig
from grpo.data.arithmetic import ITEMS, NAMES
from grpo.data.files import Table
from grpo.data.generated import generated_rows, generated_table
from grpo.data.registry import Part, check_generated, register_dataset

GAINS = ["buys", "finds", "gets", "wins"]
LOSSES = ["loses", "sells", "drops", "gives away"]
MAX_NUMBER = 9
"""Largest number gained or lost; the smallest is 1. At the start there are at most 10, in the end at most 18."""


@register_dataset("word_problems", check=check_generated)
def word_problems(data: DataConfig, part: Part, seed: int) -> Table:
    """Return 4000 training problems, or data.eval_size held-out ones. No download."""
    return generated_table("word_problems", generate_problems, data, part, seed)


def generate_problems(count: int, *, seed: int, split: Part) -> list[dict[str, str]]:
    """Return `count` different problems: question and worked answer. The same seed gives the same problems."""
    return generated_rows("word_problems", _problem, count, seed=seed, split=split)


def _problem(rng: random.Random) -> tuple[str, str]:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    number = rng.randint(1, MAX_NUMBER)
    gain = rng.random() < 0.5
    start = rng.randint(1, MAX_NUMBER) if gain else rng.randint(number + 1, MAX_NUMBER + 1)
    change = f"{rng.choice(GAINS)} {number} more" if gain else f"{rng.choice(LOSSES)} {number}"
    after = start + number if gain else start - number
    question = f"{name} has {start} {item}. {name} {change}. How many {item} does {name} have now?"
    return question, f"{start} {'+' if gain else '-'} {number} = {after}\n#### {after}"
