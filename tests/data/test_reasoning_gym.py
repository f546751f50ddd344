"""Tasks of reasoning-gym: the same rows from the same seed, parts that share no question, and the task's own score."""

import sys
from typing import Any

import pytest

from grpo.config.schema import DataConfig
from grpo.data.rows import load_examples
from grpo.errors import ConfigError
from grpo.rewards import reasoning_gym as rewards


def data(**kwargs: Any) -> DataConfig:
    return DataConfig(name="reasoning_gym", dataset_kwargs=kwargs, system_prompt=None, eval_size=10)


def test_without_the_library_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match="pip install reasoning-gym==0.1.25"):
        load_examples(data(task="chain_sum", size=3), "train", 0)


def test_settings_of_a_dataset_are_checked() -> None:
    with pytest.raises(ConfigError, match="data.name 'reasoning_gym' requires the argument 'task'"):
        load_examples(data(), "train", 0)
    with pytest.raises(ConfigError, match="has 'tsk', which is no argument .* did you mean 'task'"):
        load_examples(data(tsk="chain_sum"), "train", 0)
    with pytest.raises(ConfigError, match="its own arguments are: none"):
        load_examples(DataConfig(name="arithmetic", dataset_kwargs={"size": 3}), "train", 0)


def test_rows_and_scores_of_a_task() -> None:
    pytest.importorskip("reasoning_gym")
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    rows = load_examples(data(task="chain_sum", size=30, settings=settings), "train", 7)
    held_out = load_examples(data(task="chain_sum", size=30, settings=settings), "held_out", 7)
    assert rows == load_examples(data(task="chain_sum", size=30, settings=settings), "train", 7)
    assert len(held_out) == 10 and 20 <= len(rows) <= 30
    assert not {row.columns["question"] for row in rows} & {row.columns["question"] for row in held_out}
    assert [message["content"] for message in rows[0].messages] == [rows[0].columns["question"]]
    golds = [row.columns["answer"] for row in rows]
    question = rows[0].columns["question"]
    terms = question.rpartition("problem: ")[2].partition("=")[0]
    assert str(eval(terms)) == golds[0]  # noqa: S307 (a sum of the test)
    entry = [row.columns["entry"] for row in rows]
    assert rewards.reasoning_gym(golds, entry) == [1.0] * len(rows)
    assert rewards.reasoning_gym([f"so <answer> {gold} </answer>." for gold in golds], entry) == [1.0] * len(rows)
    assert all(score < 0.5 for score in rewards.reasoning_gym(["none"] * len(rows), entry))


def test_tasks_and_settings_that_do_not_exist() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match="reasoning-gym has no task 'sum', it has .*chain_sum"):
        load_examples(data(task="sum"), "train", 0)
    with pytest.raises(ConfigError, match="task 'chain_sum' refuses its settings .*wrong"):
        load_examples(data(task="chain_sum", settings={"wrong": 1}), "train", 0)
    with pytest.raises(ConfigError, match="refuses its settings"):
        load_examples(data(task="chain_sum", settings={"min_terms": 9, "max_terms": 2}), "train", 0)


def test_a_task_with_many_right_answers_is_scored_by_its_own_rule() -> None:
    pytest.importorskip("reasoning_gym")
    rows = load_examples(data(task="countdown", size=3), "train", 1)
    assert rewards.reasoning_gym([rows[0].columns["answer"]], [rows[0].columns["entry"]]) == [1.0]
