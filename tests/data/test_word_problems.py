"""word_problems: questions of one step, their answers, and the held-out part."""

import re

import pytest

from grpo.config.schema import DataConfig
from grpo.data.multiplication import generate_products
from grpo.data.rows import load_examples
from grpo.errors import ConfigError


def test_answers_follow_from_the_questions_and_the_parts_share_none() -> None:
    data = DataConfig(name="word_problems", eval_size=200)
    train, held_out = (load_examples(data, part, seed=3) for part in ("train", "held_out"))
    assert (len(train), len(held_out)) == (4000, 200)
    for example in train + held_out:
        question, solution = example.columns["question"], example.columns["solution"]
        start, change = (int(number) for number in re.findall(r"\d+", question))
        total = start + change if " more. " in question else start - change
        assert example.columns["answer"] == str(total) and 1 <= total <= 18 and 1 <= start <= 10 and 1 <= change <= 9
        sign = "+" if " more. " in question else "-"
        assert solution == f"{start} {sign} {change} = {total}\n#### {total}"
    questions = [{example.columns["question"] for example in part} for part in (train, held_out)]
    assert not questions[0] & questions[1]
    assert load_examples(data, "train", seed=3) == train != load_examples(data, "train", seed=4)


def test_more_problems_than_there_are_end_in_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"'multiplication' has no more than 5\d\d\d different problems.*lower data.eval_size"
    ):
        generate_products(6000, seed=0, split="held_out")
