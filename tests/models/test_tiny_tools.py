"""The texts of the tiny model that calls a calculator: the form in which it reads results while it is trained."""

import random
from dataclasses import replace

from grpo.data.multiplication import generate_products
from grpo.data.rendering import prompt_token_ids
from grpo.models.tiny import TAGS, TOOL_RECIPE, make_tokenizer, tool_texts
from grpo.turns.calculator import calculator
from grpo.turns.calls import Call, format_of, parse_calls
from grpo.turns.template import TurnTemplate


def test_products_are_true_and_no_held_out_one_is_trained_on() -> None:
    train = generate_products(300, seed=0, split="train")
    held_out = generate_products(100, seed=0, split="held_out")
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    for row in [*train, *held_out]:
        expression, _, result = row["answer"].split("\n")[0].partition(" = ")
        assert row["question"] == f"What is {expression}?"
        assert calculator(expression) == result == row["answer"].split("#### ")[1]


def test_careful_texts_are_the_turns_of_training_id_for_id() -> None:
    rows = generate_products(50, seed=0, split="train")
    careful, hasty = replace(TOOL_RECIPE, hasty_fraction=0.0), replace(TOOL_RECIPE, hasty_fraction=1.0)
    pairs = [tool_texts(row, careful, random.Random(0)) for row in rows]
    tags = (*TAGS, *TOOL_RECIPE.call, "<|tool|>")
    tokenizer = make_tokenizer([part for pair in pairs for text in pair for part in text], 500, tags, 1)
    template = TurnTemplate(tokenizer, [tokenizer.eos_token_id])
    template.check("tool", {})
    for row, ((question, call), (context, answer)) in zip(rows, pairs, strict=True):
        expression, result = row["answer"].split("\n")[0].split(" = ")
        assert question == row["question"] and answer == f"<answer>\n{result}\n</answer>\n"
        assert parse_calls(call, format_of(tokenizer)) == [Call("calculator", {"expression": expression})]
        prompt = prompt_token_ids([{"role": "user", "content": question}], tokenizer)
        sampled = [*tokenizer(call, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        given = template.given_ids([{"role": "tool", "name": "calculator", "content": result}], {})
        warm = prompt_token_ids([{"role": "user", "content": context}], tokenizer)
        assert [*prompt, *sampled, *given] == warm
        assert tool_texts(row, hasty, random.Random(0)) == [(question, answer)]
