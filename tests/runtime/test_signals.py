"""Signals in each phase, to one process or all: a checkpoint within a step, the exit code, and an exact resume."""

import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grpo.config.parser import load_config
from grpo.errors import ConfigError, Interrupted
from grpo.run.checkpoint import load_checkpoint, newest_valid
from grpo.runtime.run_lock import RunLock, check_free
from grpo.trainer import train
from tests.test_trainer import CHANGING, arguments, run

ROOT = Path(__file__).parents[2]
PHASES = {
    "rollout": "grpo.rollout.native_engine.NativeEngine.generate",
    "reward": "grpo.rewards.workers.RewardWorkerPool.collect",
    "backward": "grpo.policy.Policy.backward",
    "step": "grpo.policy.Policy.step",
    "evaluation": "grpo.run.state.Run.evaluate",
    "write": "grpo.tracking.run_logger.RunLogger.log",
    "save": "grpo.run.checkpoint._fingerprint",
}


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(CHANGING)} for row in rows]


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def interrupt(monkeypatch: pytest.MonkeyPatch, phase: str, call: int, *numbers: int) -> None:
    """Send this process signals when the phase is entered for the `call`-th time."""
    owner_path, _, name = PHASES[phase].rpartition(".")
    owner = pkgutil.resolve_name(owner_path)
    original, count = getattr(owner, name), [0]

    def wrapped(*args: object, **kwargs: object) -> object:
        count[0] += 1
        if count[0] == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


SETTINGS = {"steps": 3, "eval_every": 1, "prompts_per_step": 2, "optimizer.lr_scheduler_type": "cosine"}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train "whole", an uninterrupted run. Return its folder, with model and data beside it."""
    folder = tmp_path_factory.mktemp("signals")
    run(folder, "whole", **SETTINGS)
    return folder


QUICK = ("reward", "save")


@pytest.mark.parametrize(
    "phase", [pytest.param(phase, marks=[] if phase in QUICK else pytest.mark.slow) for phase in PHASES]
)
def test_a_signal_in_each_phase(
    whole_run: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any, phase: str
) -> None:
    tmp_path, part = whole_run, f"part-{phase}"
    record_property("signalled during", phase)
    number, code = (signal.SIGINT, 130) if phase == "backward" else (signal.SIGTERM, 143)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        # Once for step 0's evaluation; otherwise in the second step (saving: after the first).
        interrupt(patch, phase, 2, number)
        with pytest.raises(Interrupted, match="Everything is saved: go on with --resume auto") as caught:
            train(load_config(arguments(tmp_path, part, **SETTINGS)))
    assert caught.value.exit_code == code
    assert signal.getsignal(number) == before
    newest, ignored = newest_valid(tmp_path / part)
    assert newest is not None and not ignored
    done = load_checkpoint(newest)[1]["step"]
    assert done in (1, 2) and rows_of(tmp_path / part)[-1]["step"] == done  # saved at the step that it came in
    run(tmp_path, part, resume="auto", **SETTINGS)
    assert rows_of(tmp_path / part) == rows_of(tmp_path / "whole")
    assert same_weights(tmp_path / part, tmp_path / "whole")


def test_a_signal_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loading(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

    monkeypatch.setattr("grpo.data.training_data.load_tokenizer", loading)
    with pytest.raises(Interrupted, match="SIGTERM before the first step") as caught:
        train(load_config(arguments(tmp_path, "run")))
    assert caught.value.exit_code == 143
    assert not (tmp_path / "run").exists()


def write_gate(folder: Path) -> None:
    """Write a reward that waits for folder/open in the second step, and creates folder/waiting-RANK meanwhile."""
    (folder / "gate.py").write_text(
        "import os, pathlib, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "calls = 0\n"
        "def gate(completions, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 2:\n"
        "        (here / f'waiting-{os.environ.get(\"RANK\", 0)}').write_text(str(os.getpid()))\n"
        "        while not (here / 'open').exists():\n"
        "            time.sleep(0.05)\n"
        "    return [sum(c == 'a' for c in completion[0]['content']) / 8 for completion in completions]\n"
    )


def start(
    tmp_path: Path,
    name: str,
    launcher: list[str] | None = None,
    script: str = "launch/train.py",
    environment: dict[str, str] | None = None,
    **changes: object,
) -> subprocess.Popen:
    """Start a training run in a new process, whose reward waits for a file in the second step."""
    write_gate(tmp_path)
    rewards = {"rewards": json.dumps({f"{tmp_path}/gate.py:gate": 1.0})}
    flags = arguments(tmp_path, name, **({"eval_every": 0} | rewards | changes))  # evaluation calls rewards too
    command = [*(launcher or [sys.executable]), str(ROOT / script), *flags]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.Popen(
        command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def test_a_second_signal_a_locked_directory_and_the_exit_code(tmp_path: Path) -> None:
    process = start(tmp_path, "run")
    wait_for(tmp_path / "waiting-0", process)
    with pytest.raises(ConfigError, match=rf"in use by process {process.pid} on "):
        train(load_config(arguments(tmp_path, "run", resume="auto")))
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)  # sooner would pass for the same signal, sent twice by a launcher
    assert process.poll() is None  # it waits for the step to end
    process.send_signal(signal.SIGTERM)
    code, errors = ended(process)
    assert code == 143 and "press Ctrl-C again to exit immediately" in errors
    newest, ignored = newest_valid(tmp_path / "run")
    assert newest is not None and newest.name == "step-1" and ignored == []
    worker = int((tmp_path / "waiting-0").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    check_free(tmp_path / "run")  # the lock went with its holder


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_the_exit_code_of_the_command(tmp_path: Path, number: int, code: int) -> None:
    process = start(tmp_path, "run")
    wait_for(tmp_path / "waiting-0", process)
    process.send_signal(number)
    time.sleep(0.2)
    (tmp_path / "open").touch()
    assert ended(process)[0] == code
    newest, _ = newest_valid(tmp_path / "run")
    assert newest is not None and newest.name == "step-2"


def test_a_lock_is_freed_by_kill_9(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib\nfrom grpo.runtime.run_lock import RunLock\n"
        "lock = RunLock(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(100)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"in use by process {holder.pid}"):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    RunLock(tmp_path).release()
    check_free(tmp_path)
