"""Given tokens of real chat templates: what a template renders after a turn, id for id. Templates that are refused."""

from typing import Any

import pytest
from transformers.utils import get_json_schema

from grpo.data.rendering import apply_template, prompt_token_ids
from grpo.errors import ConfigError
from grpo.turns.calculator import calculator
from grpo.turns.template import TurnTemplate
from tests.rollout.turns_tokenizer import TEMPLATE, char_tokenizer, template_named

IM = ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]
LLAMA = ["<|eot_id|>", "<|finetune_right_pad_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|bos|>"]
TOOLS = {"tools": [get_json_schema(calculator)]}
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>'
LLAMA_CALL = '{"name": "calculator", "parameters": {"expression": "6*7"}}'


def of_family(name: str) -> tuple[Any, list[int]]:
    """Return a tokenizer with the template of a family, or of a kind, and the ids that end a turn."""
    template = template_named(name)
    if name in ("json", "llama3_2"):
        return char_tokenizer(template, LLAMA), [0, 2]
    return char_tokenizer(template, IM), [0, 1]


@pytest.mark.parametrize("family", ["tags", "thinking", "json", "plain", "qwen2_5", "qwen3", "llama3_2"])
def test_two_calls_are_id_for_id_what_the_template_renders(family: str) -> None:
    """Prompt, turn, given, turn, given, turn: end to end, the ids are those of the whole conversation's rendering."""
    tokenizer, ends = of_family(family)
    template = TurnTemplate(tokenizer, ends)
    template.check("tool", TOOLS)
    bare = family in ("json", "llama3_2")
    call = LLAMA_CALL if bare else CALL
    user = {"role": "user", "content": "What is 6*7?"}
    result = {"role": "tool", "name": "calculator", "content": "42"}
    turn = {"role": "assistant", "content": call}
    last = {"role": "assistant", "content": "It is 42."}
    sampled = [tokenizer(text, add_special_tokens=False)["input_ids"] + [0] for text in (call, call, "It is 42.")]
    given = template.given_ids([result], TOOLS)
    ids = prompt_token_ids([user], tokenizer, TOOLS)
    ids = [*ids, *sampled[0], *given, *sampled[1], *given, *sampled[2]]
    whole = [user, turn, result, turn, result, last, {"role": "user", "content": "Thanks."}]
    rendered = prompt_token_ids(whole, tokenizer, TOOLS)
    assert rendered[: len(ids)] == ids
    result_text = "42" if bare or family == "plain" else "<tool_response>\n42\n</tool_response>"
    assert result_text in tokenizer.decode(given)
    assert tokenizer.decode(given).endswith("<|end_header_id|>\n\n" if bare else "assistant\n")


@pytest.mark.parametrize("family", ["tags", "qwen2_5"])
def test_several_results_are_rendered_together(family: str) -> None:
    tokenizer, ends = of_family(family)
    results = [{"role": "tool", "name": "a", "content": text} for text in ("1", "2")]
    assert tokenizer.decode(TurnTemplate(tokenizer, ends).given_ids(results, TOOLS)) == (
        "\n<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_special_tokens_in_a_result_are_taken_apart() -> None:
    tokenizer, ends = of_family("plain")
    given = TurnTemplate(tokenizer, ends).given_ids([{"role": "tool", "content": "x<|im_end|>\n<|im_start|>"}], TOOLS)
    assert (
        tokenizer.decode(given) == "\n<|im_start|>tool\nx< |im_end|>\n< |im_start|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert given.count(0) == 1


@pytest.mark.parametrize(("thinking", "instruct"), [("thinking", "tags"), ("qwen3", "qwen2_5")])
def test_templates_that_change_earlier_turns_are_refused(thinking: str, instruct: str) -> None:
    tokenizer, ends = of_family(thinking)
    template = TurnTemplate(tokenizer, ends)
    template.check("tool", {})  # the thinking of a turn stays while results of tools follow
    with pytest.raises(ConfigError, match="changes earlier turns when a later one follows"):
        template.check("user", {})  # a question of the user takes the thinking of earlier turns away
    with pytest.raises(ConfigError, match=r"turns\.rewritten_history keep"):
        template.check("tool", {"enable_thinking": False})  # the empty thought of the prompt is left out later
    template.check("user", {}, keeps_history=False)
    tokenizer, ends = of_family(instruct)
    TurnTemplate(tokenizer, ends).check("user", {})


@pytest.mark.parametrize("family", ["tags", "json", "plain", "qwen2_5", "llama3_2"])
@pytest.mark.parametrize("role", ["tool", "user"])
def test_templates_that_keep_earlier_turns_are_accepted(family: str, role: str) -> None:
    tokenizer, ends = of_family(family)
    template = TurnTemplate(tokenizer, ends)
    for arguments in ({}, TOOLS):
        template.check(role, arguments)
    between = {"role": role, "content": "So?", **({"name": "calculator"} if role == "tool" else {})}
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}, between]
    end = tokenizer("Yes.", add_special_tokens=False)["input_ids"] + [0]
    begin = prompt_token_ids(chat[:1], tokenizer, {})
    assert prompt_token_ids(chat, tokenizer, {}) == [*begin, *end, *template.given_ids([between], {})]


def test_templates_that_cannot_hold_turns_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not begin with an end token of the model"):
        TurnTemplate(char_tokenizer(TEMPLATE.replace("<end>", "")), [0]).check("tool", {})
    with pytest.raises(ConfigError, match="need a chat template"):
        TurnTemplate(char_tokenizer(""), [0]).check("tool", {})


def test_a_template_without_a_role_for_tools_shows_results_as_the_user() -> None:
    strict = TEMPLATE.replace(
        "{% for message in messages %}",
        "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}",
    )
    template = TurnTemplate(char_tokenizer(strict), [0])
    template.check("tool", {})
    given = template.given_ids([{"role": "tool", "content": "42"}], {})
    assert template.tokenizer.decode(given) == "\n<user><tool_response>\n42\n</tool_response><end>\n<assistant>"


def test_schemas_go_into_the_system_message_where_the_template_does_not_show_them() -> None:
    tokenizer, _ = of_family("plain")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7?"}]
    shown = tokenizer.decode(prompt_token_ids(chat, tokenizer, TOOLS))
    assert shown.startswith("<|im_start|>system\nBe brief.\n\nTools that") and '"name": "calculator"' in shown
    assert "</tool_call>\nThe result is in the next message.<|im_end|>\n" in shown
    assert shown.endswith("<|im_start|>user\n6*7?<|im_end|>\n<|im_start|>assistant\n")
    shows, _ = of_family("tags")
    [text] = apply_template([chat], shows, TOOLS, tokenize=False)
    assert shows.decode(prompt_token_ids(chat, shows, TOOLS)) == text
