"""Environments of verifiers: rows, turns, calls of tools and the rubric's reward, from its own rollout."""

import concurrent.futures
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo.config.parser import load_config
from grpo.config.schema import DataConfig
from grpo.data.rows import Example, load_examples
from grpo.errors import ConfigError
from grpo.trainer import train
from grpo.turns.verifiers import VerifiersEnvironment, VerifiersToolEnvironment
from grpo.types import Prompt
from tests.compat.test_turns import call, folder_of

GAMES = "tests.turns.verifiers_games"


def examples(kind: str, part: Any = "train") -> list[Example]:
    kwargs = {"environment": GAMES, "arguments": {"kind": kind}}
    return load_examples(DataConfig(name="verifiers", dataset_kwargs=kwargs), part, 0)


def prompt_of(example: Example) -> Prompt:
    return Prompt(0, example.messages, (), example.columns)


def test_without_the_library_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(ConfigError, match="verifiers is missing.* pip install verifiers==0.3.1"):
        VerifiersEnvironment("nothing")


def test_the_rollout_of_verifiers_is_asked_turn_by_turn() -> None:
    pytest.importorskip("verifiers")
    first, second, _ = examples("echo")
    assert first.messages == [{"role": "user", "content": "say 0"}] and len(examples("echo", "held_out")) == 3
    assert second.columns == {"question": "say 1", "answer": "1", "example_id": 1}
    made = [VerifiersEnvironment(GAMES, {"kind": "echo"}) for _ in range(2)]  # two completions side by side
    assert [one.reset(prompt_of(second)) for one in made] == [second.messages] * 2
    for one, last, reward in zip(made, ("1", "2"), (2.0, 0.0), strict=True):
        assert one.step("four").messages == [{"role": "user", "content": "4 letters"}]
        step = one.step("seven..")
        assert (step.messages, step.reward, step.done) == ([{"role": "user", "content": "7 letters"}], None, False)
        step = one.step(last)
        assert (step.messages, step.reward, step.done) == ([], reward, True)


def test_an_error_of_the_environment_ends_the_completion() -> None:
    pytest.importorskip("verifiers")
    one = VerifiersEnvironment(GAMES, {"kind": "echo"})
    one.reset(prompt_of(examples("echo")[0]))
    with pytest.raises(RuntimeError, match="broken"):
        one.step("break")
    with pytest.raises(ConfigError, match="environment 'nowhere' cannot be loaded"):
        VerifiersEnvironment("nowhere")


def test_a_completion_that_is_given_up_ends_its_rollout() -> None:
    pytest.importorskip("verifiers")
    one = VerifiersEnvironment(GAMES, {"kind": "echo"})
    one.reset(prompt_of(examples("echo")[0]))
    one.step("a turn")
    task = one.exchange.task
    assert not task.done()
    del one
    with pytest.raises(concurrent.futures.CancelledError):
        task.result(timeout=10)


def test_tools_of_verifiers_are_shown_and_called() -> None:
    pytest.importorskip("verifiers")
    row = examples("tools")[0]
    assert row.messages[0] == {"role": "system", "content": "Use the tool."}
    [schema] = row.columns["tools"]
    assert schema["function"]["name"] == "double" and "x" in schema["function"]["parameters"]["properties"]
    one = VerifiersToolEnvironment(GAMES, {"kind": "tools"})
    one.reset(prompt_of(row))
    step = one.step(call("double", x=4) + call("double", x=-1) + "<tool_call>{")
    assert [message["name"] for message in step.messages] == ["double", "double", ""]
    assert [message["content"] for message in step.messages][:2] == ["8", "negative"]
    assert step.calls[0] == {"name": "double", "arguments": {"x": 4}} and step.failures == 1 and not step.done
    step = one.step("0")
    assert (step.messages, step.reward, step.done) == ([], 2.0, True)


@pytest.mark.slow
def test_a_run_with_an_environment_of_verifiers(tmp_path: Path) -> None:
    pytest.importorskip("verifiers")
    folder = folder_of(tmp_path / "model", [call("double", x=x) for x in range(9)])
    kwargs = json.dumps({"environment": GAMES, "arguments": {"kind": "tools"}})
    flags = ["--data.name=verifiers", f"--data.dataset_kwargs={kwargs}", "--environment=verifiers_tools"]
    flags += [f"--environment_kwargs={kwargs}", "--rewards={environment: 1.0}", f"--model.name={folder}", "--steps=2"]
    flags += [f"--run_dir={tmp_path / 'run'}", "--sampling.max_completion_length=600", "--tracking.report_to=[]"]
    flags += [
        "--prompts_per_step=3",
        "--data.max_prompt_length=2000",
        "--tokens_per_batch=4000",
        "--eval_every=0",
        "--turns.deadline=90",
    ]
    train(load_config(flags))
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert sum(row["turns"]["calls"] for row in rows) > 5
    for row in rows:
        turns = row["turns"]["messages"]
        assert sum(message["role"] == "assistant" for message in turns) <= 3  # max_turns of the environment
        for message in turns:
            for number, one in enumerate(message.get("tool_calls", [])):
                result = turns[turns.index(message) + 1 + number]
                assert result["role"] == "tool" and result["content"] == str(2 * one["arguments"]["x"])
