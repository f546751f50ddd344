"""Faults on one of two processes: both react in the same way, and the first line of the output is the cause."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo.config.parser import load_config
from grpo.errors import NumericsError
from grpo.policy import Policy
from grpo.run.checkpoint import newest_valid
from grpo.trainer import train
from tests.faulty_train import fingerprint
from tests.run.test_resume import LORA, checkpoints_equal, stopped_at
from tests.runtime.test_distributed import CPU_2
from tests.runtime.test_signals import ROOT, ended, rows_of, start, wait_for, write_gate
from tests.test_trainer import arguments, run


def launch(
    folder: Path, name: str, script: str = "launch/train.py", environment: dict[str, str] | None = None, **changes: Any
):
    flags = arguments(folder, name, **changes)
    return subprocess.run(
        [*CPU_2, str(ROOT / script), *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=280,
    )


def draws(folder: Path) -> list[tuple[int, int, int]]:
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    return [(row["step"], row["draw"], row["sample"]) for row in map(json.loads, lines)]


SETTINGS = {"steps": 4, "eval_every": 0, "optimizer.lr_scheduler_type": "cosine"}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train "whole", an uninterrupted run of two ranks. Return its folder; model, data and reward lie beside it."""
    folder = tmp_path_factory.mktemp("ranks")
    write_gate(folder)
    whole = launch(folder, "whole", **gated(folder))
    assert whole.returncode == 0, whole.stderr
    return folder


def gated(folder: Path) -> dict[str, Any]:
    """Return SETTINGS with the reward of folder/gate.py and an open gate."""
    (folder / "open").touch()
    return SETTINGS | {"rewards": json.dumps({f"{folder}/gate.py:gate": 1.0})}


@pytest.mark.slow
def test_resume_on_two_ranks_and_on_another_number_of_them(whole_run: Path, tmp_path: Path) -> None:
    """Two ranks resumed as two are equal to the bit. Two as one and one as two: the same prompts and samples."""
    settings = gated(whole_run)
    stopped_at(whole_run, "two", 2)
    stopped_at(whole_run, "one", 2)
    with ThreadPoolExecutor() as pool:
        start_of_two = pool.submit(launch, whole_run, "two", resume="auto", **settings)
        run(tmp_path, "whole", **settings)
        stopped_at(tmp_path, "more", 2)
        start_of_more = pool.submit(launch, tmp_path, "more", resume="auto", **settings)
        run(whole_run, "one", resume="auto", **settings)
        two, more = start_of_two.result(), start_of_more.result()
    assert two.returncode == 0, two.stderr
    assert rows_of(whole_run / "two") == rows_of(whole_run / "whole")
    assert checkpoints_equal(whole_run / "two", whole_run / "whole")
    assert draws(whole_run / "one") == draws(whole_run / "whole")
    assert "resume: 1 -> 2 processes (the same prompts in each step)" in more.stdout, more.stderr
    assert draws(tmp_path / "more") == draws(tmp_path / "whole") == draws(whole_run / "whole")


@pytest.mark.slow
def test_resume_on_two_ranks_with_lora_and_two_iterations(tmp_path: Path) -> None:
    """Stop after the first step, and before the last one."""
    settings = {
        "steps": 4,
        "optimizer.lr_scheduler_type": "cosine",
        "eval_every": 0,
        "objective.num_iterations": 2,
    } | LORA
    whole = launch(tmp_path, "whole", **settings)
    assert whole.returncode == 0, whole.stderr
    stops = (1, 3)
    for stop in stops:
        stopped_at(tmp_path, f"part-{stop}", stop)
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda stop: launch(tmp_path, f"part-{stop}", resume="auto", **settings), stops))
    for stop, part in zip(stops, parts, strict=True):
        assert part.returncode == 0, part.stderr
        assert rows_of(tmp_path / f"part-{stop}") == rows_of(tmp_path / "whole")
        assert draws(tmp_path / f"part-{stop}") == draws(tmp_path / "whole")
        assert checkpoints_equal(tmp_path / f"part-{stop}", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["one rank", "all ranks"])
def test_a_signal_to_one_rank_or_all_of_them(whole_run: Path, to: str) -> None:
    for file in ("open", "waiting-0", "waiting-1"):
        (whole_run / file).unlink(missing_ok=True)
    process = start(whole_run, to, CPU_2, **SETTINGS)
    for rank in (0, 1):
        wait_for(whole_run / f"waiting-{rank}", process)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if _is_rank(child)]
    assert len(ranks) == 2
    chosen = ranks[1:] if to == "one rank" else ranks
    for rank in chosen:
        rank.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    settings = gated(whole_run)
    code, errors = ended(process)
    assert code != 0
    newest, ignored = newest_valid(whole_run / to)
    assert newest is not None and newest.name == "step-2" and ignored == []
    assert "stopped by a signal after step 2 of 4" in errors
    assert [row["step"] for row in rows_of(whole_run / to)] == [1, 2]
    # The gate is open now: the same run goes on, and is equal to the last bit to the one that nothing stopped.
    assert launch(whole_run, to, resume="auto", **settings).returncode == 0
    assert [row["step"] for row in rows_of(whole_run / to)] == [1, 2, 3, 4]
    assert rows_of(whole_run / to) == rows_of(whole_run / "whole")
    assert draws(whole_run / to) == draws(whole_run / "whole")
    assert checkpoints_equal(whole_run / to, whole_run / "whole")


def _is_rank(process: psutil.Process) -> bool:
    words = process.cmdline()
    return (
        any(word.endswith(("launch/train.py", "tests/faulty_train.py")) for word in words)
        and "accelerate.commands.launch" not in words
    )


def first_error(errors: str) -> str:
    """Return the first line of `errors` that reports an error."""
    return next((line for line in errors.splitlines() if re.search(r"error|Error|Traceback", line)), "")


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job_with_its_own_words_first(tmp_path: Path, record_property: Any) -> None:
    (tmp_path / "one_rank.py").write_text(
        "import os, pathlib\n"
        "def one_rank(completions, **columns):\n"
        "    if os.environ.get('RANK') == '1':\n"
        "        pathlib.Path(__file__).with_name('raised').touch()\n"
        "        raise ValueError('only here')\n"
        "    return [float(index) for index, _ in enumerate(completions)]\n"
    )
    result = launch(tmp_path, "run", rewards=json.dumps({f"{tmp_path}/one_rank.py:one_rank": 1.0}), eval_every=0)
    record_property("seconds from raising to the end of the job", round(time.time() - raised_at(tmp_path)))
    assert result.returncode != 0
    assert first_error(result.stderr).startswith("[rank 1] error: reward '"), result.stderr
    assert "ValueError('only here')" in first_error(result.stderr)


def raised_at(folder: Path) -> float:
    """Return the time when the reward raised last, in seconds since 1970."""
    return (folder / "raised").stat().st_mtime


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "endless loop"])
def test_a_rank_that_hangs_ends_the_job(tmp_path: Path, record_property: Any, how: str) -> None:
    """Rank 1 is stopped (SIGSTOP) or hangs in its second backward pass. The other rank kills it after rank_timeout; the
    launcher would wait 30 s more after SIGTERM."""
    script = "launch/train.py" if how == "stopped" else "tests/faulty_train.py"
    fault = {"FAULT": "loop:1:2", "FAULT_LOG": str(tmp_path)}
    process = start(tmp_path, "run", CPU_2, script, fault, eval_every=0, rank_timeout=15)
    for rank in (0, 1):
        wait_for(tmp_path / f"waiting-{rank}", process)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if _is_rank(child)]
    assert len(ranks) == 2
    if how == "stopped":
        ranks[1].suspend()
    (tmp_path / "open").touch()
    before = time.monotonic()
    code, errors = ended(process)
    record_property("seconds after the hang, 15 of them rank_timeout", round(time.monotonic() - before))
    assert code != 0
    said = first_error(errors)
    assert said.startswith("[rank 0] error: another process died, or did not answer within rank_timeout"), errors
    assert said.removeprefix("[rank 0] ") in (ROOT / "docs" / "errors.md").read_text().splitlines()
    assert "forcefully exiting via" not in errors  # the launcher's words when it had to kill a rank itself
    assert not any(rank.is_running() for rank in ranks)
    assert newest_valid(tmp_path / "run")[0] is not None


@pytest.mark.slow
def test_nan_on_one_rank_changes_nothing_on_any(tmp_path: Path, record_property: Any) -> None:
    """Weights and moments are unchanged to the bit on both ranks, and the run continues."""
    environment = {"FAULT": "nan:1:2", "FAULT_LOG": str(tmp_path)}
    result = launch(tmp_path, "run", "tests/faulty_train.py", environment, eval_every=0)
    assert result.returncode == 0, result.stderr
    logs = [
        [json.loads(line) for line in (tmp_path / f"rank-{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
    ]
    assert logs[0] == logs[1]
    assert [row["before"] == row["after"] for row in logs[0]] == [False, True, False, False]
    record_property("steps skipped, nothing changed", 1)
    assert [row["policy/skipped_steps"] for row in rows_of(tmp_path / "run")] == [0, 1, 0, 0]
    assert sorted(path.name for path in (tmp_path / "run" / "faults").iterdir()) == [
        "step-2-rank-0.safetensors",
        "step-2-rank-1.safetensors",
    ]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_three_skipped_steps_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any, where: str
) -> None:
    """Exit code 4 with the weights and moments from before the first one. Two in a row do not end the run."""
    bad = {1, 2, 4, 5, 6}  # optimizer steps
    prints: list[tuple[str, str]] = []
    backward, step = Policy.backward, Policy.step

    def faulty_backward(self: Policy, loss: Any) -> None:
        backward(self, loss * float("nan") if where == "loss" and len(prints) in bad else loss)
        if where == "gradient" and len(prints) in bad:
            next(iter(self.model.parameters())).grad.view(-1)[0] = float("inf")

    def logged_step(self: Policy, usable: bool = True) -> float:
        before = fingerprint(self)
        norm = step(self, usable)
        prints.append((before, fingerprint(self)))
        return norm

    monkeypatch.setattr(Policy, "backward", faulty_backward)
    monkeypatch.setattr(Policy, "step", logged_step)
    with pytest.raises(NumericsError, match="3 optimizer steps in a row .*step 7.* not finite") as caught:
        train(load_config(arguments(tmp_path, "run", steps=9, eval_every=0, save_every=0)))
    assert caught.value.exit_code == 4
    assert [before == after for before, after in prints] == [number in bad for number in range(7)]
    record_property("steps skipped, nothing changed", len(bad))
    assert [row["policy/skipped_steps"] for row in rows_of(tmp_path / "run")] == [float(n in bad) for n in range(7)]


def test_this_file_reads_what_the_launcher_says() -> None:
    assert first_error("fine\n[rank 1] error: x\nTraceback") == "[rank 1] error: x"
    assert sys.executable in CPU_2
