"""TRL's tools and environments: what the policy reads, what is called, and which object a reward gets."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo import GRPOConfig, GRPOTrainer
from grpo.compat.environments import OpenedPrompt, environments_of, given_turns, with_environments
from grpo.compat.logs import completion_logs
from grpo.errors import ConfigError
from grpo.types import Prompt
from tests.compat.tools import Counter, add
from tests.fakes import tiny_model
from tests.rollout.turns_tokenizer import SPECIAL, char_tokenizer

CHAT = [{"role": "user", "content": "count"}]
ROWS = [{"prompt": CHAT, "n": n} for n in range(8)]


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def folder_of(path: Path, calls: list[str]) -> str:
    """Save a tiny random model with a token for each call, and many tokens that end a turn."""
    tokenizer = char_tokenizer(special=[*SPECIAL, *calls])
    model = tiny_model("llama", spread=1.0, vocab_size=len(tokenizer))  # a family without a tokenizer class
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = [0, *range(20, 102, 10)]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def arguments(path: Path, **fields: Any) -> GRPOConfig:
    small = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 400, "max_steps": 2}
    small |= {"logging_steps": 1, "learning_rate": 1e-2, "bf16": False, "gradient_checkpointing": False}
    return GRPOConfig(str(path), **(small | fields))


def rollouts(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "rollouts.jsonl").read_text().splitlines()]


def length(completions: list[Any]) -> list[float]:
    return [float(len(completion)) for completion in completions]


# The environment of one completion


def test_an_environment_of_trl_turn_by_turn() -> None:
    given = given_turns([add], Counter)
    kind = given.environment(char_tokenizer(), 2)
    group = [kind() for _ in range(3)]
    prompt = Prompt(4, CHAT, (), {"n": 7, "chat_template_kwargs": {}})
    messages = [one.reset(prompt) for one in group]
    assert messages == [[{"role": "user", "content": "count from 7"}]] * 3 and CHAT[0]["content"] == "count"
    assert group[0].instance.rows == [{"prompt": CHAT, "n": 7}]
    first = group[0].step(call("increase", step=2) + call("increase", step=3) + call("add", a=1, b=2) + call("reset"))
    assert [message["content"] for message in first.messages] == [
        "2",
        "error: ValueError: never 3",
        "3",
        "error: there is no tool 'reset'. Tools: add, increase",
    ]
    assert [message["role"] for message in first.messages] == ["tool"] * 4 and first.failures == 2 and not first.done
    assert first.calls[0] == {"name": "increase", "arguments": {"step": 2}} and len(first.calls) == 4
    assert group[0].step("<tool_call>{").failures == 1
    assert group[0].step(call("increase", step=5)).done and group[0].instance.total == 2  # two turns with calls
    assert group[1].step("no call").done
    # The prompt of the group is what the first environment returned: it leads to all of them.
    assert environments_of([messages[0]] * 3) == [one.instance for one in group]
    [reward] = given.rewards()
    assert reward.__name__ == "Counter" and reward(prompts=[messages[0]] * 3) == [2.0, 0.0, 0.0]


def test_environments_are_made_once_and_reset_often() -> None:
    Counter.made = 0
    given = given_turns(None, Counter)
    kind = given.environment(char_tokenizer(), None)
    for draw in range(3):  # the objects of the group before are free after the first reset of the next one
        group, prompt = [kind() for _ in range(2)], Prompt(draw, CHAT, (), {"n": draw})
        opened = [one.reset(prompt) for one in group]
        assert environments_of([opened[0]] * 2) == [one.instance for one in group]
        del group, opened
    assert Counter.made <= 4


def test_groups_of_one_prompt_that_is_sampled_twice_are_kept_apart() -> None:
    given = given_turns(None, Counter)
    kind, prompt = given.environment(char_tokenizer(), None), Prompt(0, CHAT, (), {"n": 0})
    both = [kind() for _ in range(4)]
    opened = [one.reset(prompt) for one in both]  # two calls of the engine with two completions each
    assert environments_of([opened[2]] * 2) == [one.instance for one in both[2:]]


def test_a_reward_with_environments_has_its_own_signature() -> None:
    def total(completions: list[Any], environments: list[Counter]) -> list[float]:
        return [float(one.total) for one in environments]

    given = given_turns(None, Counter)
    kind = given.environment(char_tokenizer(), None)
    one = kind()
    opened = one.reset(Prompt(0, CHAT, (), {"n": 0}))
    one.step(call("increase", step=6))
    wrapped = with_environments(total)
    assert wrapped.__name__ == "total" and wrapped(completions=["x"], prompts=[opened]) == [6.0]
    assert with_environments(length) is length and with_environments("accuracy") == "accuracy"
    with pytest.raises(ValueError, match="are gone"):
        wrapped(completions=["x"], prompts=[list(opened)])
    assert isinstance(opened, OpenedPrompt) and type(opened.__reduce__()[1][0]) is list


def test_logs_of_calls_by_hand() -> None:
    rows = [
        {"draw": 0, "length": 2, "ended": True, "reward": 1.0, "rewards": {}, "turns": {"calls": 3, "failures": 1}},
        {"draw": 0, "length": 2, "ended": True, "reward": 1.0, "rewards": {}, "turns": {"calls": 1, "failures": 0}},
    ]
    logs = completion_logs(rows)
    assert logs["tools/call_frequency"] == 2.0 and logs["tools/failure_frequency"] == 0.25


# Bad input


def untyped(a, b):  # noqa: ANN001, ANN201
    return a + b


class NoReset:
    pass


def test_tools_and_environments_that_cannot_be_used() -> None:
    for tools, factory, message in [
        ([untyped], None, "tools: 'untyped' has no schema"),
        ([7], None, r"tools has 7 \(int\)"),
        ([add, add], None, "two tools are called 'add'"),
        (None, NoReset, r"NoReset has no method reset\(\*\*row\)"),
        (None, 7, "environment_factory is 7"),
    ]:
        with pytest.raises(ConfigError, match=message):
            given_turns(tools, factory)


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", [])
    for given, message in [
        ({"train_dataset": [{"prompt": "a"}], "tools": [add]}, "row 1: the prompt is a text, but tools"),
        ({"train_dataset": None, "tools": [add]}, "train_dataset is missing"),
        (
            {"train_dataset": ROWS, "environment_factory": {"a": Counter}},
            "row 1: the environment is None, needs one of",
        ),
        ({"train_dataset": ROWS, "rollout_func": length}, "rollout_func is not supported: for several turns"),
    ]:
        with pytest.raises(ConfigError, match=message):
            GRPOTrainer(folder, length, arguments(tmp_path / "out"), **given).train()


# Training


@pytest.mark.slow
def test_tools_are_called_between_turns(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", [call("add", a=a, b=10) for a in range(9)])
    args = arguments(tmp_path / "out", max_tool_calling_iterations=2)
    trainer = GRPOTrainer(folder, length, args, ROWS, tools=[add])
    assert trainer.config.tools == ["tests.compat.tools:add"] and trainer.config.turns.workers == 2
    trainer.config.turns.workers = 0  # no processes in a fast test
    trainer.train()
    rows = rollouts(tmp_path / "out")
    called = [row for row in rows if row["turns"]["calls"]]
    assert len(called) > 4 and all(row["turns"]["failures"] == 0 for row in rows)
    for row in called:
        messages = row["turns"]["messages"]
        results = [int(message["content"]) for message in messages if message["role"] == "tool"]
        asked = [one["arguments"]["a"] + 10 for message in messages for one in message.get("tool_calls", [])]
        assert results == asked and row["reward"] == len(messages)
        assert sum(message["role"] == "assistant" for message in messages) <= 3
    assert trainer.config.data.chat_template_kwargs["tools"][0]["function"]["description"] == "Add two numbers."
    logs = [entry for entry in trainer.state.log_history if "tools/call_frequency" in entry]
    assert logs[0]["tools/call_frequency"] == sum(row["turns"]["calls"] for row in rows[:8]) / 8


@pytest.mark.slow
def test_an_environment_owns_prompt_and_reward(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", [call("increase", step=step) for step in range(1, 10)])
    seen = []

    def total(environments: list[Counter], **columns: Any) -> list[float]:
        seen.append([one.total for one in environments])
        return [float(one.total) for one in environments]

    args = arguments(tmp_path / "out", reward_weights=[0.5])
    trainer = GRPOTrainer(folder, total, args, ROWS, environment_factory=Counter)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    rows = rollouts(tmp_path / "out")
    assert [value for one in seen for value in one] == [row["reward"] / 1.5 for row in rows]
    for row in rows:
        results = [one["content"] for one in row["turns"]["messages"] if one["role"] == "tool"]
        counts = [int(text) for text in results if not text.startswith("error")]
        assert row["rewards"]["Counter"] == (counts[-1] if counts else 0)
    assert len({row["rewards"]["Counter"] for row in rows}) > 2
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert trainer.evaluate(ROWS[:2])["eval_rewards/Counter/mean"] >= 0


@pytest.mark.slow
def test_rows_name_their_environment_and_need_no_prompt(tmp_path: Path) -> None:
    class Down(Counter):
        def decrease(self, step: int) -> str:
            """Count down.

            Args:
                step: By how much.
            """
            self.total -= step
            return str(self.total)

    calls = [call(name, step=step) for name in ("increase", "decrease") for step in range(4, 9)]
    folder = folder_of(tmp_path / "model", calls)
    rows = [{"environment": name, "n": n} for n in range(4) for name in ("up", "down")]
    given = {"up": Counter, "down": Down}
    trainer = GRPOTrainer(folder, None, arguments(tmp_path / "out"), rows, environment_factory=given)
    trainer.train()
    found = rollouts(tmp_path / "out")
    assert list(found[0]["rewards"]) == ["Counter", "Down"]
    columns = {row["draw"]: row["columns"] for row in found if "columns" in row}  # in the first row of a group
    for row in found:  # only the tools of its own environment are there
        up = columns[row["draw"]]["environment"] == "up"
        failed = [one for one in row["turns"]["messages"] if one["content"].startswith("error")]
        assert all(("no tool 'decrease'" in one["content"]) == up for one in failed) and (up or not failed)
        [own] = [name for name, value in row["rewards"].items() if value is not None and value == value]
        assert own == ("Counter" if up else "Down")
    alone = GRPOTrainer(folder, length, arguments(tmp_path / "none"), environment_factory=Numbered)
    alone.train()
    assert {row["prompt"] for row in rollouts(tmp_path / "none") if "prompt" in row} == {"go 1"}


class Numbered(Counter):
    """An environment that gives the prompt."""

    def reset(self, **row: Any) -> str:
        assert not row
        self.total = 0
        return "go 1"
