"""`grpo check` with tools and environments: one conversation, and what cannot work is refused before weights load."""

import json
from pathlib import Path

import pytest

from grpo.config.parser import load_config
from grpo.errors import ConfigError
from grpo.tools import check as command
from grpo.tools.check_config import check
from grpo.tools.check_turns import call_text, example_call
from grpo.turns.calculator import calculator
from grpo.turns.tools import schema_of
from tests.fakes import tiny_data, tiny_model
from tests.rollout.turns_tokenizer import KINDS, char_tokenizer

HERE = Path(__file__).parent / "turns_for_check.py"
SPECIAL = ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "<tool_call>", "</tool_call>"]


def flags(path: Path, template: str | None) -> list[str]:
    text = None if template is None else KINDS[template]
    tokenizer = char_tokenizer("", SPECIAL)
    tokenizer.chat_template = text
    model = tiny_model("llama", vocab_size=len(tokenizer))  # a family without a tokenizer class
    model.generation_config.eos_token_id = 0
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    (path / "model" / "model.safetensors").unlink()  # no weight is read
    tiny_data(path / "data.jsonl")
    given = {"model.name": path / "model", "data.path": path / "data.jsonl", "run_dir": path / "run"}
    given |= {"data.system_prompt": "null", "tracking.report_to": "[]", "data.max_prompt_length": 2000}
    given |= {"turns.workers": 0, "sampling.max_completion_length": 64}
    return [f"--{key}={value}" for key, value in given.items()]


def test_a_call_of_a_tool_as_the_template_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*flags(tmp_path, "tags"), "--tools=[calculator]"]
    found = check(load_config(given))
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "..."}}\n</tool_call><|im_end|>'
    assert [part.kind for part in found.conversation] == ["prompt", "sampled", "given", "sampled"]
    prompt, sampled, result, _ = found.conversation
    assert '"name": "calculator"' in prompt.text and prompt.text.endswith("0+1=<|im_end|>\n<|im_start|>assistant\n")
    assert sampled.text == call and sampled.tokens == len(call) - len("<tool_call></tool_call><|im_end|>") + 3
    assert result.text == (
        "\n<|im_start|>user\n<tool_response>\n(the result of calculator)\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt.tokens == found.prompts[0].tokens and found.problems == []
    assert not any("parsed" in line for line in found.warnings)
    command.main([*given, f"--output={tmp_path / 'check.json'}"])
    shown = capsys.readouterr().out
    assert "[given: " in shown and "the result of calculator" in shown and "tools" in shown
    assert "chat_template_kwargs" not in shown.partition("the other")[0]  # the schemas are no setting of the user
    saved = json.loads((tmp_path / "check.json").read_text())["conversation"]
    assert saved[1] == {"kind": "sampled", "text": call, "tokens": sampled.tokens}


def test_an_environment_is_reset_and_answers_a_turn(tmp_path: Path) -> None:
    given = [*flags(tmp_path, "tags"), f"--environment={HERE}:Guess", "--rewards={environment: 1.0}"]
    found = check(load_config([*given, "--environment_kwargs={hint: higher}"]))
    prompt, _, result = found.conversation
    assert prompt.text.endswith("user\nguess 1<|im_end|>\n<|im_start|>assistant\n")
    assert result.text == "\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n"
    assert found.problems == [] and found.rewards["environment"].problem is None
    assert set(found.rewards["environment"].scores.values()) == {None}
    failing = check(load_config([*given, "--environment_kwargs={hint: none}"]))
    assert failing.problems == ["environment: reset failed for prompt 0: ValueError: no hint"]


@pytest.mark.parametrize(
    ("template", "flag", "message"),
    [
        ("tags", f"--tools=['{HERE}:untyped']", r"tools: '.*:untyped' has no schema"),
        ("tags", "--tools=[python]", "runs code that the model writes"),
        ("tags", f"--environment={HERE}:untyped", "is not a class with reset"),
        ("tags", f"--environment={HERE}:Guess|--environment_kwargs={{hnt: a}}", "did you mean 'hint'"),
        ("thinking", f"--environment={HERE}:Guess", "the chat template changes earlier turns when a later one follows"),
        (None, "--tools=[calculator]", "tools and environments need a chat template"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, template: str | None, flag: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(load_config([*flags(tmp_path, template), *flag.split("|")]))


def test_calls_by_hand() -> None:
    function = schema_of("calculator", calculator)["function"]
    assert example_call(function) == {"expression": "..."}
    mixed = {"properties": {"a": {"type": "integer"}, "b": {"enum": ["x"]}, "c": {"type": "string"}}}
    assert example_call({"parameters": {**mixed, "required": ["a", "b"]}}) == {"a": 1, "b": "x"}
    assert call_text("json", "f", {"a": 1}) == '{"name": "f", "parameters": {"a": 1}}'
    assert call_text("mistral", "f", {}) == '[TOOL_CALLS][{"name": "f", "arguments": {}}]'
