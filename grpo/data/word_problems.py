"""Dataset word_problems: generated word problems of one step, with worked answers that end in `#### N`.

    question  Tom has 5 books. Tom buys 9 more. How many books does Tom have now?
    answer    5 + 9 = 14
              #### 14

A small pretrained model can solve them, and has to learn to answer in a format and to choose the operation. A hash of
the question decides which problems are held out, so that the two parts never share one.
"""

import random

from grpo.config.schema import DataConfig
from grpo.data.arithmetic import HELD_OUT_SIZE, ITEMS, NAMES, TRAIN_SIZE, is_held_out
from grpo.data.files import Row, Table, table_of
from grpo.data.registry import Part, register_dataset

GAINS = ["buys", "finds", "gets", "wins"]
LOSSES = ["loses", "sells", "drops", "gives away"]
MAX_NUMBER = 9
"""Largest number gained or lost; the smallest is 1. At the start there are at most 10, in the end at most 18."""


@register_dataset("word_problems")
def word_problems(data: DataConfig, part: Part, seed: int) -> Table:
    """Return 4000 training problems, or data.eval_size held-out ones. No download."""
    held_out_size = HELD_OUT_SIZE if data.eval_size is None else data.eval_size
    rows: list[Row] = generate_problems(TRAIN_SIZE if part == "train" else held_out_size, seed=seed, part=part)
    return table_of("word_problems", rows)


def generate_problems(count: int, *, seed: int, part: Part) -> list[Row]:
    """Return `count` different problems: question and worked answer. The same seed gives the same problems."""
    rng = random.Random(f"word_problems {part} {seed}")
    problems: dict[str, str] = {}
    while len(problems) < count:
        question, answer = _problem(rng)
        if is_held_out(question) == (part == "held_out"):
            problems.setdefault(question, answer)
    return [{"question": question, "answer": answer} for question, answer in problems.items()]


def _problem(rng: random.Random) -> tuple[str, str]:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    number = rng.randint(1, MAX_NUMBER)
    gain = rng.random() < 0.5
    start = rng.randint(1, MAX_NUMBER) if gain else rng.randint(number + 1, MAX_NUMBER + 1)
    change = f"{rng.choice(GAINS)} {number} more" if gain else f"{rng.choice(LOSSES)} {number}"
    after = start + number if gain else start - number
    question = f"{name} has {start} {item}. {name} {change}. How many {item} does {name} have now?"
    return question, f"{start} {'+' if gain else '-'} {number} = {after}\n#### {after}"
