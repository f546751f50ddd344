"""Generated word problems in GSM8K's format: a seed -> questions with worked answers that end in `#### N`.

    question  Tom has 3 apples. Tom buys 4. Tom loses 2. Tom finds 4. Tom drops 1. How many apples now?
    answer    3+4=7
              7-2=5
              5+4=9
              9-1=8
              #### 8

Every step is a one-digit fact, so a small model can learn to work the answer out line by line; to give it at once, it
would have to do four steps in its head. Which problems are held out is decided by a hash of the question, so the two
parts can never share one.
"""

import hashlib
import random
from typing import Literal

NAMES = ["Tom", "Anna", "Ben", "Mia", "Sam", "Lea", "Max", "Eva"]
ITEMS = ["apples", "books", "coins", "cards", "pens", "shells", "stamps", "marbles"]
GAINS = ["buys", "finds", "gets", "wins"]
LOSSES = ["loses", "sells", "drops", "breaks"]
STEPS = 4
LARGEST = 5
"""Numbers in a question go from 1 to 5."""
LARGEST_TOTAL = 9
"""No running total has two digits."""


def generate_problems(count: int, *, seed: int, split: Literal["train", "held_out"]) -> list[dict[str, str]]:
    """`count` different problems: question and worked answer. The same seed gives the same problems."""
    chance = random.Random(f"arithmetic {split} {seed}")
    problems: dict[str, str] = {}
    while len(problems) < count:
        question, answer = _problem(chance)
        if is_held_out(question) == (split == "held_out"):
            problems.setdefault(question, answer)
    return [{"question": question, "answer": answer} for question, answer in problems.items()]


def is_held_out(question: str) -> bool:
    """One question in eight, whatever the seed."""
    return hashlib.sha256(question.encode()).digest()[0] < 32


def _problem(chance: random.Random) -> tuple[str, str]:
    name, item = chance.choice(NAMES), chance.choice(ITEMS)
    total = chance.randint(1, LARGEST)
    sentences = [f"{name} has {total} {item}."]
    lines = []
    for _ in range(STEPS):
        number = chance.randint(1, LARGEST)
        gain = total + number <= LARGEST_TOTAL and (total < number or chance.random() < 0.5)
        if not gain and total < number:  # neither fits: lose what there is, or less
            number = chance.randint(1, total)
        verb = chance.choice(GAINS if gain else LOSSES)
        sentences.append(f"{name} {verb} {number}.")
        after = total + number if gain else total - number
        lines.append(f"{total}{'+' if gain else '-'}{number}={after}")
        total = after
    sentences.append(f"How many {item} now?")
    return " ".join(sentences), "\n".join([*lines, f"#### {total}"])
