"""Tools and environments in worker processes: results, errors, deadlines, crashes."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from grpo.errors import ConfigError, EngineError
from grpo.turns.calculator import calculator
from grpo.turns.calls import Call
from grpo.turns.environment import StepResult, find_environment
from grpo.turns.retrieval import CORPUS, retrieval
from grpo.turns.tools import find_tools, schema_of
from grpo.turns.workers import TurnWorkers
from grpo.types import Message, Prompt


async def double(number: int) -> dict[str, int]:
    """Double a number.

    Args:
        number: The number.
    """
    await asyncio.sleep(0)
    return {"double": 2 * number}


def hang(seconds: float) -> str:
    """Wait.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return "done"


def crash() -> str:
    """End the process."""
    os._exit(3)


class Counter:
    """Counts the turns. The turn "hang" never ends, "raise" raises."""

    def __init__(self, first: int = 0):
        self.count = first

    def reset(self, prompt: Prompt) -> list[Message] | None:
        return [{"role": "user", "content": f"count from {self.count} for {prompt.columns['who']}"}]

    def step(self, completion: str) -> StepResult:
        if completion == "hang":
            time.sleep(60)
        if completion == "raise":
            raise ValueError("no such move")
        self.count += 1
        return [{"role": "user", "content": str(self.count)}], None, self.count == 9


def texts(workers: TurnWorkers, *calls: Call) -> tuple[list[str], int]:
    step = workers.call(list(calls)).result()
    return [message["content"] for message in step.messages], step.failures


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_results_and_errors_are_texts(workers: int) -> None:
    pool = TurnWorkers({"calculator": calculator, "double": double}, workers=workers, max_result_length=20)
    try:
        calls = [
            Call("calculator", {"expression": "(17 + 5) * 3"}),
            Call("double", {"number": 4}),
            Call("calculator", {"expression": "1/0"}),
            Call("calculator", {"wrong": "1"}),
            Call("triple", {}),
            Call("", error="the call is not valid JSON"),
            Call("calculator", {"expression": "10**25"}),
        ]
        found, failures = texts(pool, *calls)
        assert found[:2] == ["66", '{"double": 8}'] and failures == 4
        assert found[2].startswith("error: ZeroDivision") and found[3].startswith("error: TypeError")
        assert found[4] == "error: there is no tool 'triple'. Tools: calculator, double"
        assert found[5] == "error: the call is not valid JSON"
        assert found[6] == "10000000000000000000... [cut: the result is longer than 20 characters]"
    finally:
        pool.close()


@pytest.mark.slow
def test_a_tool_that_hangs_or_crashes_costs_only_its_own_call() -> None:
    pool = TurnWorkers({"hang": hang, "crash": crash, "double": double}, workers=1, deadline=4.0)
    try:
        calls = [
            Call("double", {"number": 1}),
            Call("hang", {"seconds": 60}),
            Call("crash"),
            Call("double", {"number": 2}),
        ]
        found, failures = texts(pool, *calls)
        assert found[0] == '{"double": 2}' and found[3] == '{"double": 4}' and failures == 2
        assert found[1] == "error: it gave no result within 4 s"
        assert found[2].startswith("error: it ended its process")
    finally:
        pool.close()


@pytest.mark.slow
def test_environments_survive_the_end_of_their_process() -> None:
    """One completion hangs and its process is killed: another one's object, in the same process, is made again."""
    pool = TurnWorkers(environment=Counter, environment_kwargs={"first": 3}, workers=1, deadline=4.0)
    try:
        prompt = Prompt(0, "", (), {"who": "me"})
        assert pool.reset((0, 0), prompt).result() == [{"role": "user", "content": "count from 3 for me"}]
        pool.reset((0, 1), prompt).result()
        assert pool.step((0, 0), prompt, ["a"]).result().messages[0]["content"] == "4"
        hung = pool.step((0, 1), prompt, ["hang"]).result()
        assert hung.done and hung.failures == 1 and hung.reward is None
        assert pool.step((0, 0), prompt, ["a", "b"]).result().messages[0]["content"] == "5"
        assert pool.step((0, 0), prompt, ["a", "b", "raise"]).result().failures == 1
    finally:
        pool.close()


def test_a_reset_that_fails_ends_the_run() -> None:
    pool = TurnWorkers(environment=Counter, workers=0)
    with pytest.raises(EngineError, match="reset failed for prompt 7: KeyError"):
        pool.reset((0, 0), Prompt(7, "", ())).result()


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("2+3*4", "14"),
        ("(1,234 × 56) − 4", "69100"),
        ("7/2", "3.5"),
        ("1/3", "0.333333333333"),
        ("2^10", "1024"),
        ("17 // 5 + 17 % 5 - -1", "6"),
        ("123456789 * 987654321", "121932631112635269"),
        ("0.1 + 0.2", "0.3"),
    ],
)
def test_calculator(expression: str, result: str) -> None:
    assert calculator(expression) == result


@pytest.mark.parametrize("expression", ["__import__('os')", "9**9**9", "x", "(1).real", "'a'*9", "1" * 300, "2**0.5"])
def test_calculator_computes_nothing_else(expression: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        calculator(expression)


def test_retrieval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "facts.txt").write_text("Rome is in Italy.\n\nParis is in France. Paris has a tower.\n\nParis, Texas.")
    monkeypatch.setenv(CORPUS, str(tmp_path / "facts.txt"))
    assert retrieval("tower of paris", 1) == "[2] Paris is in France. Paris has a tower."
    assert retrieval("paris", 9).splitlines()[0] == "[3] Paris, Texas."  # the shorter of two, with one mention
    assert retrieval("Berlin") == "no passage contains these words"


def test_tools_need_a_schema_and_a_name_of_their_own() -> None:
    assert schema_of("calculator", calculator)["function"]["parameters"]["required"] == ["expression"]
    with pytest.raises(ConfigError, match="has no schema"):
        find_tools(["os.path:join"])
    with pytest.raises(ConfigError, match="two tools are called 'calculator'"):
        find_tools(["calculator", "grpo.turns.calculator:calculator"])
    with pytest.raises(ConfigError, match="did you mean 'calculator'"):
        find_tools(["calculater"])
    with pytest.raises(ConfigError, match="runs code that the model writes"):
        find_tools(["python"])
    assert list(find_tools(["python", "retrieval"], trust_model_code=True)) == ["python", "retrieval"]
    with pytest.raises(ConfigError, match="is not a class with reset"):
        find_environment("pathlib:Path")


def test_python_runs_in_a_process_with_limits() -> None:
    python = find_tools(["python"], trust_model_code=True)["python"]
    assert python("print(6*7)") == "42\n"
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        python("1/0")
    with pytest.raises(RuntimeError, match="MemoryError"):
        python("x = bytearray(10**9)")
    assert python("import os; print(set(os.environ) - {'LC_CTYPE'} == {'HOME', 'PATH'}, os.listdir())") == "True []\n"
