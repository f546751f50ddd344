"""Rewards in worker processes: failures are masked and counted, hanging calls are killed, the rest is unchanged."""

import dataclasses
import io
import itertools
import math
import os
import random
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator

from grpo.advantages import group_advantages
from grpo.errors import RewardError
from grpo.rewards.context import Notes, TrainerState
from grpo.rewards.registry import REWARDS
from grpo.rewards.scoring import RewardSum, Scores, concatenate_scores
from grpo.rewards.worker_process import Worker, _flushable_streams, address_of
from grpo.rewards.workers import RewardWorkerPool
from grpo.run.step_metrics import recorded_metrics, rollout_rows
from tests import faulty_rewards
from tests.rewards.test_rewards import group

FAULTY = "tests.faulty_rewards:faulty"


@pytest.fixture
def pools() -> Iterator[list[RewardWorkerPool]]:
    made: list[RewardWorkerPool] = []
    yield made
    for pool in made:
        pool.close()


def run(pools: list[RewardWorkerPool], *texts: str, name: str = FAULTY, **options: Any) -> Any:
    pool = RewardWorkerPool({name: 1.0}, **options)
    pools.append(pool)
    return pool([group(*texts, messages="text")])


def test_a_forked_worker_keeps_no_pipe_of_another_thread_open() -> None:
    """A thread that reads from a program must see its end, also if a worker was forked before it closed its copy."""
    reader, writer = os.pipe()
    worker = Worker("here", lambda completions, **_: [1.0] * len(completions), {})
    try:
        worker.start()
        os.close(writer)
        assert select.select([reader], [], [], 20)[0] and os.read(reader, 1) == b""
        worker.send({"completions": ["a", "b"]}, TrainerState(), 20)
        assert worker.receive(20) == ([1.0, 1.0], Notes())
    finally:
        worker.kill()
        os.close(reader)


def test_values_are_those_of_the_function(pools: list[RewardWorkerPool]) -> None:
    weights = {"accuracy": 1.0, "xml_format": 0.2, "tests.letters:count_letters": 0.5}
    groups = [
        group("<reasoning>\n1\n</reasoning>\n<answer>\n4\n</answer>", "<answer>4</answer>", answer="4"),
        group("aab", "", answer=None),
    ]
    pool = RewardWorkerPool(weights)
    pools.append(pool)
    apart, here = pool(groups), RewardSum(weights)(groups)
    torch.testing.assert_close(apart.rewards_PG, here.rewards_PG, rtol=0, atol=0, equal_nan=True)
    for name in weights:
        torch.testing.assert_close(apart.by_name[name], here.by_name[name], rtol=0, atol=0, equal_nan=True)
    assert apart.failures == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("nan", "returned nan: it must be finite"),
        ("inf", "returned inf: it must be finite"),
        ("huge", r"returned 10000000.0: more than 1e\+06"),
        ("text", r"returned a str \('1.0'\)"),
        ("nested", "returned a list"),
        ("raise", r"raised ValueError\('cannot read it'\)"),
        ("die", "ended its process by SIGSEGV"),
        ("leave", r"ended its process \(exit code 7\)"),
    ],
)
def test_one_bad_completion_is_masked_and_counted(pools: list[RewardWorkerPool], fault: str, reason: str) -> None:
    scores = run(pools, "a", "abc", fault, "ab")
    [failure] = scores.failures
    assert (failure.reward, failure.index, failure.timed_out) == (FAULTY, 2, False)
    assert re.match(reason, failure.reason), failure.reason
    assert scores.rewards_PG[0].isnan().tolist() == [False, False, True, False]
    # Masked is not 0: mean and deviation are those of 1, 3, 2, so the advantages are -1, 1, 0 (up to 1e-4).
    assert group_advantages(scores.rewards_PG)[0].tolist() == pytest.approx([-1, 1, 0, 0], abs=1e-3)


def test_none_does_not_apply_and_is_no_failure(pools: list[RewardWorkerPool]) -> None:
    scores = run(pools, "a", "none")
    assert scores.failures == [] and scores.rewards_PG.isnan().tolist() == [[False, True]]


def sleeping() -> list[psutil.Process]:
    """The programs that the fault "child" starts."""
    return [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", "1000"]]


@pytest.mark.parametrize("fault", ["hang", "spin", "child"])
def test_a_hang_is_killed_and_only_it_is_masked(
    pools: list[RewardWorkerPool], record_property: Any, fault: str
) -> None:
    scores = run(pools, "a", "abc", fault, "ab", deadline=2.0)
    [failure] = scores.failures
    assert failure.index == 2 and failure.timed_out
    assert failure.reason == "gave no value within 0.25 s"
    in_words = {"hang": "asleep", "spin": "in C code", "child": "waiting for a program that it started"}
    record_property("killed while", in_words[fault])
    assert scores.rewards_PG[0, [0, 1, 3]].tolist() == [1, 3, 2]
    deadline = time.monotonic() + 10  # a killed process that waits for a core is still listed
    while (left := sleeping()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def test_a_long_temporary_folder(tmp_path: Path) -> None:
    """The socket of the fork server does not fit into it. In a process of its own: there is one server per process."""
    folder = tmp_path / ("x" * 125)
    folder.mkdir()
    program = (
        "from grpo.rewards.workers import RewardWorkerPool\n"
        "if __name__ == '__main__':\n"
        f"    pool = RewardWorkerPool({{{FAULTY!r}: 1.0}}, deadline=60.0)\n"
        "    pool.start()\n"
        "    pool.close()\n"
        "    print('done')\n"
    )
    (tmp_path / "program.py").write_text(program)
    variables = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, str(tmp_path / "program.py")]
    ended = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "done\n", ended.stderr


def test_a_slow_reward_makes_no_other_one_wait(pools: list[RewardWorkerPool]) -> None:
    pool = RewardWorkerPool({FAULTY: 1.0, "tests.faulty_rewards:steady": 1.0}, deadline=30.0)
    pools.append(pool)
    pool([group("a", "b", messages="text")])
    pool.submit([group("hang", "b", messages="text")])
    assert pool._pending is not None
    [slow], [fast] = pool._pending[1]
    assert fast.result(timeout=20).values == [1.0, 1.0]  # there, while the other one still hangs
    assert not slow.done()


def test_a_reward_that_compares_completions_is_asked_again_without_the_bad_one(pools: list[RewardWorkerPool]) -> None:
    scores = run(pools, "a", "raise", "abc", name="tests.faulty_rewards:relative")
    assert scores.rewards_PG[0, [0, 2]].tolist() == [0.25, 0.75]  # 1 / 4 and 3 / 4: the bad one counts nowhere
    assert [failure.index for failure in scores.failures] == [1]


@pytest.mark.parametrize(
    ("texts", "name", "message"),
    [
        (
            ["a", "raise", "raise", "b"],
            FAULTY,
            r"failed on 2 of 4 completions: raised .* on completion number 1, 'raise'",
        ),
        (["a", "b", "c"], "tests.faulty_rewards:short", "failed on 3 of 3.*returned 1 values for 3 completions"),
    ],
)
def test_a_reward_that_fails_often_ends_the_run(
    pools: list[RewardWorkerPool], texts: list[str], name: str, message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        run(pools, *texts, name=name)


def test_what_becomes_of_a_failure_can_be_chosen(pools: list[RewardWorkerPool]) -> None:
    scores = run(pools, "ab", "raise", on_error="zero")
    assert scores.rewards_PG.tolist() == [[2.0, 0.0]] and len(scores.failures) == 1
    with pytest.raises(RewardError, match="raised ValueError.* on completion number 1, 'raise'"):
        run(pools, "ab", "raise", on_error="raise")


def test_silence_for_three_steps_ends_the_run(pools: list[RewardWorkerPool]) -> None:
    pool = RewardWorkerPool({FAULTY: 1.0}, deadline=0.5)
    pools.append(pool)
    for _ in range(2):
        silent = pool([group("hang", "hang", messages="text")])
        assert len(silent.failures) == 2 and silent.rewards_PG.isnan().all()
    with pytest.raises(RewardError, match="none of the completions of 3 steps in time.*raise scoring.deadline"):
        pool([group("hang", "hang", messages="text")])


def test_a_failed_part_masks_the_sum(pools: list[RewardWorkerPool]) -> None:
    pool = RewardWorkerPool({FAULTY: 1.0, "tests.faulty_rewards:steady": 0.5})
    pools.append(pool)
    scores = pool([group("ab", "raise", "none", messages="text")])
    assert scores.rewards_PG[0, 0] == 2.5 and scores.rewards_PG[0, 2] == 0.5  # None: only the other one applies
    assert math.isnan(scores.rewards_PG[0, 1])  # failed: what it would have added is not known
    assert scores.by_name["tests.faulty_rewards:steady"].tolist() == [[1, 1, 1]]


def test_a_function_that_no_other_process_can_import(pools: list[RewardWorkerPool], monkeypatch: Any) -> None:
    offset = 3.0

    def from_a_notebook(completions: list[Any]) -> list[float]:
        return [len(text) + offset for text in completions]

    assert address_of(from_a_notebook) is None
    assert address_of(faulty_rewards.steady) == "tests.faulty_rewards:steady"
    monkeypatch.setattr(REWARDS, "_entries", {**REWARDS._entries, "notebook": from_a_notebook})
    assert run(pools, "a", "ab", name="notebook").rewards_PG.tolist() == [[4.0, 5.0]]


def test_rewards_of_a_file_and_a_registered_one(pools: list[RewardWorkerPool], tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "from grpo import register_reward\n"
        "@register_reward('runner_test_mine')\n"
        "def mine(completions, **columns):\n"
        "    return [2.0 for _ in completions]\n"
    )
    assert run(pools, "a", name=f"{tmp_path}/mine.py:mine").rewards_PG.tolist() == [[2.0]]
    assert run(pools, "a", name="runner_test_mine").rewards_PG.tolist() == [[2.0]]


def test_a_worker_that_is_killed_once_costs_no_completion(pools: list[RewardWorkerPool], tmp_path: Any) -> None:
    """By the system for want of memory, or by hand: the call is made again."""
    (tmp_path / "killed.py").write_text(
        "import os, pathlib\n"
        "def once(completions, **columns):\n"
        f"    mark = pathlib.Path({str(tmp_path / 'mark')!r})\n"
        "    if not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return [float(len(completions)) for _ in completions]\n"
    )
    scores = run(pools, "a", "ab", name=f"{tmp_path}/killed.py:once")
    assert scores.rewards_PG.tolist() == [[2.0, 2.0]] and scores.failures == []


def test_no_process_thread_or_file_is_left(pools: list[RewardWorkerPool]) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    pool = RewardWorkerPool({FAULTY: 1.0}, deadline=1.0)
    pool([group("a", messages="text")])
    pool.close()
    files, threads = open_files(), threading.active_count()
    for _ in range(2):
        pool = RewardWorkerPool({FAULTY: 1.0}, deadline=1.0)
        pool([group("a", "hang", "die", messages="text")])
        pool.close()
    assert open_files() <= files
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= threads
    assert [child for child in psutil.Process().children(recursive=True) if child.status() == "zombie"] == []


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_reward_may_print_to_a_full_disk() -> None:
    program = (
        "from grpo.rewards.workers import RewardWorkerPool\n"
        "from tests.rewards.test_rewards import group\n"
        "pool = RewardWorkerPool({'tests.faulty_rewards:chatty': 1.0})\n"
        "scores = pool([group('a', messages='text')])\n"
        "assert scores.failures == [] and scores.rewards_PG.tolist() == [[1.0]], scores\n"
    )
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True)
    assert "AssertionError" not in result.stderr, result.stderr


# Hostile to eval, to sympy, to regular expressions, to parsers.
PAYLOADS = [
    "9**9**9**9",
    "-" * 200_000,
    "(" * 100_000,
    "\\frac{" * 2_000 + "1" + "}{1}" * 2_000,
    "{" * 50_000 + "}" * 50_000,
    "9^{9^{9^9}}",
    "10^{10^{10^{10}}}",
    "100000000!",
    "((3!)!)!",
    "2^{99999999}",
    "x^{x^{x^{x^x}}}",
    "\\int_0^{10^{10^{10}}} e^{x^{99999}} dx",
    "\\sum_{n=1}^{10^{99}} n^{99}",
    "\\sqrt[99999]{" * 50 + "2" + "}" * 50,
    "9" * 100_000,
    "1/3" * 30_000,
    "__import__('os').system('touch /tmp/pwned')",
    "</reasoning><answer>" * 5_000,
    "1,2," * 20_000,
    "\\pi" * 10_000,
]


def hostile_completions() -> list[str]:
    wraps = ["\\boxed{%s}", "<answer>%s</answer>", "<reasoning>\n%s\n</reasoning>\n<answer>\n%s\n</answer>", "%s"]
    made = itertools.cycle(wrap.replace("%s", payload) for payload, wrap in itertools.product(PAYLOADS, wraps))
    return list(itertools.islice(made, 64))


def test_64_hostile_completions(pools: list[RewardWorkerPool], record_property: Any) -> None:
    """Every built-in reward, math_verify among them, on one step of them: bounded, and none earns anything for its
    answer. The bound is on the work: how often a process had to be killed, each time within its second."""
    pytest.importorskip("math_verify")
    texts = hostile_completions()
    weights = {"math_verify": 1.0, "accuracy": 1.0, "countdown": 1.0, "exact_match": 1.0}
    pool = RewardWorkerPool(weights)
    pools.append(pool)
    began = time.monotonic()
    hostile = pool([group(*texts, answer="7", nums=[7], target=7)])
    record_property("seconds for all of them", round(time.monotonic() - began, 1))
    assert sum(failure.timed_out for failure in hostile.failures) <= 8
    assert all(failure.timed_out for failure in hostile.failures), hostile.failures
    for name in weights:
        assert hostile.by_name[name].nan_to_num().sum() == 0, name
    assert not os.path.exists("/tmp/pwned")
    record_property("hostile completions tried", len(texts))
    record_property("killed", sum(failure.timed_out for failure in hostile.failures))


@pytest.mark.parametrize(
    ("answer", "gold", "value"),
    [
        ("\\frac{1}{2}", "0.5", 1.0),
        ("x+1", "1+x", 1.0),
        ("\\frac{2}{4}", "\\frac{1}{2}", 1.0),
        ("1,080", "1080.0", 1.0),
        ("8", "7", 0.0),
        ("2^{3}", "8", 1.0),
        ("9^{9^{9^9}}", "8", 0.0),
    ],
)
def test_math_verify(answer: str, gold: str, value: float) -> None:
    pytest.importorskip("math_verify")
    from grpo.rewards.math_verified import math_verify

    for text in (f"so it is \\boxed{{{answer}}}.", f"<reasoning>r</reasoning><answer>{answer}</answer>"):
        assert math_verify(completions=[text, "no answer"], answer=[gold, gold]) == [value, 0.0]
    assert math_verify(completions=["\\boxed{1}"], answer=[None]) == [None]


def test_no_reward_vector_makes_a_non_finite_advantage(record_property: Any) -> None:
    """All pairs of extreme values, and random vectors of them."""
    extremes = [0.0, -0.0, 1.0, 1e-300, 1e6, -1e6, 1e30, 1e200, 1e308, -1.7e308, math.inf, -math.inf, math.nan]
    rows = [[a, b, a] for a, b in itertools.product(extremes, repeat=2)]
    generator = random.Random(0)
    rows += [[generator.choice(extremes) for _ in range(3)] for _ in range(500)]
    record_property("hostile reward vectors tried", len(rows))
    for scale in ("group", "batch", "none"):
        advantages = group_advantages(torch.tensor(rows, dtype=torch.float64), scale=scale)
        assert bool(torch.isfinite(advantages.float()).all()), scale
        for row in rows[:50]:
            assert bool(torch.isfinite(group_advantages(torch.tensor([row]), scale=scale).float()).all()), (row, scale)


def test_groups_that_are_offered_early_get_the_same_scores_and_are_judged_once(
    pools: list[RewardWorkerPool], tmp_path: Any
) -> None:
    """`each` scores single completions and may start early; `relative` compares completions and may not."""
    calls = tmp_path / "calls"
    (tmp_path / "mine.py").write_text(
        "from grpo.rewards.registry import one_by_one\n"
        "@one_by_one(1.0)\n"
        "def each(completions, **columns):\n"
        f"    open({str(calls)!r}, 'a').write(completions[0] + chr(10))\n"
        "    if completions[0] == 'raise':\n"
        "        raise ValueError\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    weights = {f"{tmp_path}/mine.py:each": 1.0, "tests.faulty_rewards:relative": 1.0}
    groups = [group("a", "abc", messages="text"), group("ab", "raise1", messages="text")]
    groups = [dataclasses.replace(g, prompt=dataclasses.replace(g.prompt, draw=draw)) for draw, g in enumerate(groups)]
    plain, early = RewardWorkerPool(weights), RewardWorkerPool(weights)
    pools += [plain, early]
    expected = plain(groups)
    once = sorted(calls.read_text().split())
    calls.unlink()
    for each in reversed(groups):  # in whatever order they are finished
        early.offer(each)
    early.submit(groups)
    got = early.collect()
    assert sorted(calls.read_text().split()) == once
    torch.testing.assert_close(got.rewards_PG, expected.rewards_PG, rtol=0, atol=0, equal_nan=True)
    assert got.failures == expected.failures
    again = early(groups)  # offered groups are forgotten once they are submitted
    torch.testing.assert_close(again.rewards_PG, expected.rewards_PG, rtol=0, atol=0, equal_nan=True)


def test_a_failure_in_a_group_that_was_offered_names_its_place_among_all(
    pools: list[RewardWorkerPool], tmp_path: Any
) -> None:
    (tmp_path / "mine.py").write_text(
        "from grpo.rewards.registry import one_by_one\n"
        "@one_by_one(1.0)\n"
        "def each(completions, **columns):\n"
        "    return [1.0 / (completions[0] != 'bad') for c in completions]\n"
    )
    pool = RewardWorkerPool({f"{tmp_path}/mine.py:each": 1.0})
    pools.append(pool)
    groups = [group(*texts, messages="text") for texts in (["a"] * 4, ["b", "b", "bad", "b"])]
    groups = [dataclasses.replace(g, prompt=dataclasses.replace(g.prompt, draw=draw)) for draw, g in enumerate(groups)]
    for each in groups:
        pool.offer(each)
    pool.submit(groups)
    scores = pool.collect()
    assert [failure.index for failure in scores.failures] == [6]
    assert scores.rewards_PG.isnan().flatten().nonzero().flatten().tolist() == [6]


def test_keyword_arguments_reach_the_processes(pools: list[RewardWorkerPool], tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "def mine(completions, limit: int, **columns):\n    return [float(limit) for _ in completions]\n"
    )
    name = f"{tmp_path}/mine.py:mine"
    pool = RewardWorkerPool({name: 1.0}, kwargs={name: {"limit": 7}})
    pools.append(pool)
    assert pool([group("a", "b", messages="text")]).rewards_PG.tolist() == [[7.0, 7.0]]


RECORDING = """
async def mine(prompts, completions, trainer_state, log_extra, log_metric, **columns):
    log_metric("my/length", sum(map(len, completions)) / len(completions))
    log_extra("length", [len(text) for text in completions])
    if "x" in "".join(completions):
        raise ValueError("x")
    return [float(trainer_state.global_step + trainer_state.max_steps) for _ in completions]
"""


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("each", [True, False])
def test_async_rewards_and_what_trl_gives_to_them(tmp_path: Any, apart: bool, each: bool) -> None:
    """trainer_state, log_extra and log_metric, in worker processes and in this one, all together and one by one."""
    marked = f"from grpo.rewards.registry import one_by_one\n{RECORDING}\nmine = one_by_one(5.0)(mine)\n"
    (tmp_path / "mine.py").write_text(marked if each else RECORDING)
    kind: Any = RewardWorkerPool if apart else RewardSum
    pool = kind({f"{tmp_path}/mine.py:mine": 1.0})
    try:
        pool.state = TrainerState(global_step=3, max_steps=10)
        groups = [group("a", "abc", messages="text"), group("", "ab", messages="text")]
        for one in groups[: each and apart]:
            pool.offer(one)
        scores = pool(groups)
        assert scores.rewards_PG.tolist() == [[13.0, 13.0], [13.0, 13.0]]
        assert scores.notes.extra == {"length": {0: 1, 1: 3, 2: 0, 3: 2}}
        values = scores.notes.metrics["my/length"]
        assert sum(values) / len(values) == 1.5
        rows = rollout_rows(1, groups, scores, scores.rewards_PG)
        assert [row["extra"] for row in rows] == [{"length": length} for length in (1, 3, 0, 2)]
        assert recorded_metrics(Accelerator(cpu=True), scores.notes) == {"my/length": 1.5}
    finally:
        pool.close()


def test_notes_of_completions_that_failed_do_not_count(pools: list[RewardWorkerPool], tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(RECORDING)
    scores = run(pools, "aa", "x", "b", name=f"{tmp_path}/mine.py:mine")
    assert scores.rewards_PG[0].isnan().tolist() == [False, True, False]
    assert scores.notes.extra == {"length": {0: 2, 2: 1}} and scores.notes.metrics == {"my/length": [1.5]}


def test_notes_of_several_rounds_count_on() -> None:
    parts = []
    for size in (2, 1):
        notes = Notes({"m": [float(size)]}, {"c": dict.fromkeys(range(size), size)})
        parts.append(Scores(torch.zeros(1, size, dtype=torch.float64), {}, [], notes))
    joined = concatenate_scores([parts[0], dataclasses.replace(parts[0])])
    assert joined.notes == Notes({"m": [2.0, 2.0]}, {"c": {0: 2, 1: 2, 2: 2, 3: 2}})


def test_a_file_that_changes_during_the_run_is_refused(pools: list[RewardWorkerPool], tmp_path: Any) -> None:
    """The reward's own file, and one that it imports. The process in which it is loaded goes on."""
    program = (
        "from factors_of_mine import FACTOR\ndef mine(completions, **_):\n    return [FACTOR for _ in completions]\n"
    )
    for changed in ("mine.py", "factors_of_mine.py"):
        (tmp_path / "mine.py").write_text(program)
        (tmp_path / "factors_of_mine.py").write_text("FACTOR = 2.0\n")
        pool = RewardWorkerPool({f"{tmp_path}/mine.py:mine": 1.0})
        pools.append(pool)
        groups = [group("a", messages="text")]
        assert pool(groups).rewards_PG.tolist() == [[2.0]]
        (tmp_path / changed).write_text((tmp_path / changed).read_text().replace("FACTOR ", "FACTOR  "))
        assert pool(groups).rewards_PG.tolist() == [[2.0]]
        pool._rewards[0].workers[0].kill()
        with pytest.raises(RewardError, match=rf"{changed} was changed during the run .*--allow_changes '\[rewards\]'"):
            pool(groups)
        (tmp_path / changed).write_text((tmp_path / changed).read_text().replace("FACTOR  ", "FACTOR "))
        assert pool(groups).rewards_PG.tolist() == [[2.0]]  # the old file is back


def test_a_forked_worker_ends_with_its_parent() -> None:
    """It has inherited the other end of its own pipe, as a second forked worker would."""
    program = (
        "import os, signal\n"
        "from grpo.rewards.worker_process import Worker\n"
        "workers = [Worker(name, (lambda completions: [1.0 for _ in completions]), {}) for name in 'ab']\n"
        "for worker in workers: worker.start()\n"
        "print(*(worker._process.pid for worker in workers), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60)
    left = [int(pid) for pid in done.stdout.split()]
    assert len(left) == 2
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in left)


@pytest.mark.slow
def test_workers_end_with_a_trainer_that_is_killed() -> None:
    """Also a forked worker, whose function cannot be imported elsewhere, and one started before it."""
    program = (
        "import os, signal\n"
        "from grpo.rewards.registry import register_reward\n"
        "from grpo.rewards.workers import RewardWorkerPool\n"
        "from tests.rewards.test_rewards import group\n"
        "@register_reward('typed_here')\n"
        "def typed_here(completions, **columns):\n"
        "    return [1.0 for _ in completions]\n"
        "pool = RewardWorkerPool({'tests.faulty_rewards:steady': 1.0, 'typed_here': 1.0})\n"
        "assert pool([group('a', messages='text')]).rewards_PG.tolist() == [[2.0]]\n"
        "print(*(reward.workers[0]._process.pid for reward in pool._rewards), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60)
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers)


def test_streams_that_cannot_be_flushed_are_hidden_while_a_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, standard output keeps what it could not write. Starting a process would fail at its flush."""

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    full = Full()
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", None)
    with _flushable_streams():
        assert sys.stdout is not full
        sys.stdout.flush()
        assert sys.stderr is None
    assert sys.stdout is full
