"""Calls in the formats of the common models."""

import pytest

from grpo.turns.calls import Call, format_of, parse_calls
from tests.rollout.turns_tokenizer import char_tokenizer, template_named

ADD = Call("add", {"a": 1, "b": [2]})


@pytest.mark.parametrize(
    ("style", "text", "calls"),
    [
        ("tags", 'So:\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>', [ADD]),
        ("tags", '<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2]}}</tool_call>' * 2, [ADD, ADD]),
        ("tags", '<tool_call>[{"name": "add", "arguments": {"a": 1, "b": [2]}}]</tool_call>', [ADD]),
        ("tags", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": [2]}"}</tool_call>', [ADD]),
        ("tags", "no call, 3 < 4", []),
        ("tags", '{"name": "add", "arguments": {}}', []),
        ("json", '{"name": "add", "parameters": {"a": 1, "b": [2]}}', [ADD]),
        ("json", '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": [2]}}', [ADD]),
        ("json", '<|python_tag|>{"name": "add", "arguments": {}}; {"name": "b"}', [Call("add", {}), Call("b", {})]),
        ("json", 'I would call {"name": "add"}', []),
        ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": [2]}}]', [ADD]),
        ("mistral", "nothing", []),
    ],
)
def test_formats(style: str, text: str, calls: list[Call]) -> None:
    assert parse_calls(text, style) == calls


@pytest.mark.parametrize(
    ("style", "text", "error"),
    [
        ("tags", "<tool_call>{oops}</tool_call>", "not valid JSON"),
        ("tags", '<tool_call>{"name": "add"', "not valid JSON"),
        ("tags", '<tool_call>{"arguments": {}}</tool_call>', "a call must be"),
        ("tags", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "must be a JSON object"),
        ("json", '{"name": "add", "parameters": ', "not valid JSON"),
        ("json", "<|python_tag|>print(1)", "only JSON calls"),
    ],
)
def test_calls_that_cannot_be_read_have_an_error(style: str, text: str, error: str) -> None:
    [call] = parse_calls(text, style)
    assert call.error is not None and error in call.error


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("tags", "tags"),
        ("thinking", "tags"),
        ("json", "json"),
        ("plain", "tags"),  # it says nothing
        ("qwen2_5", "tags"),
        ("qwen3", "tags"),
        ("llama3_2", "json"),
    ],
)
def test_the_format_is_that_of_the_template(template: str, style: str) -> None:
    assert format_of(char_tokenizer(template_named(template))) == style


def test_the_parser_of_the_tokenizer_is_used_where_it_has_one() -> None:
    tokenizer = char_tokenizer()
    tokenizer.response_template = {
        "start_anchor": "<assistant>",
        "fields": {
            "tool_calls": {
                "open": "CALL ",
                "close": " END",
                "repeats": True,
                "content": "json",
                "transform": {
                    "type": "function",
                    "function": {"name": "{content.name}", "arguments": "{content.args}"},
                },
            },
            "content": {"close_pattern": "$", "content": "text"},
        },
    }
    assert format_of(tokenizer) == "response"
    text = 'CALL {"name": "add", "args": {"a": 1, "b": [2]}} END'
    assert parse_calls(text, "response", tokenizer, prefix="<user>x<end>\n<assistant>") == [ADD]
    [call] = parse_calls("CALL {oops END", "response", tokenizer)
    assert call.error is not None and "cannot be parsed" in call.error
