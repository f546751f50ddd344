"""Signals to `accelerate launch`: what is left of the run, for each signal and one or two processes."""

import contextlib
import itertools
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from shared import BY_LENGTH, ROOT, TINY_RUN, character_tokenizer, random_qwen2, write_additions

from grpo.errors import GrpoError

SIGNALS = ("TERM", "KILL", "HUP", "INT")
CONFIGS = {1: "cpu.yaml", 2: "cpu_2proc.yaml"}
START_SECONDS = 600
SECONDS = 120
"""Longest wait for the processes to end: long, because the last step and its save are slow on a busy machine. torchrun
itself kills its workers after 30 s."""


def signal_table() -> list[dict[str, Any]]:
    """Send each signal to the launcher alone, in the middle of a run. Return one row for each."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = random_qwen2(
            40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        )
        model.save_pretrained(folder / "model")
        character_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789+=").save_pretrained(folder / "model")
        write_additions(folder, BY_LENGTH)
        rows = []
        for processes, name in itertools.product(CONFIGS, SIGNALS):
            rows.append(one_signal(folder, name, processes))
            print(rows[-1], flush=True)
        return rows


def one_signal(folder: Path, name: str, processes: int) -> dict[str, Any]:
    """Start a run in a session of its own, signal its launcher after the second step, and count what is left."""
    run_dir = folder / f"{name}-{processes}"
    settings = TINY_RUN | {
        "model.name": str(folder / "model"),
        "data.path": str(folder / "data.jsonl"),
        "run_dir": str(run_dir),
        "rewards": f'{{"{folder}/noise.py:noise": 1.0}}',
        "steps": "1000000",
        "save_every": "0",
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "accelerate_configs" / CONFIGS[processes])]
    command = [*launcher, str(ROOT / "launch" / "train.py"), *flags]
    with (folder / f"{name}-{processes}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, preexec_fn=_default_signals
        )
    below: list[psutil.Process] = []
    try:
        _wait(lambda: _lines(run_dir / "metrics.jsonl") >= 2 or process.poll() is not None, START_SECONDS)
        if process.poll() is not None or _lines(run_dir / "metrics.jsonl") < 2:
            raise GrpoError((folder / f"{name}-{processes}.log").read_text())
        below = psutil.Process(process.pid).children(recursive=True)  # torchrun gives each worker a session of its own
        process.send_signal(getattr(signal, f"SIG{name}"))
        began = time.monotonic()
        process.wait(timeout=SECONDS)
        _wait(lambda: not _alive(below))
        return {
            "signal": name,
            "processes": processes,
            "launcher": process.returncode,
            "left": len(_alive(below)),
            "seconds": round(time.monotonic() - began, 1),
            "checkpoint": any(run_dir.glob("checkpoints/step-*/manifest.json")),
        }
    finally:
        process.kill()
        for one in _alive(below):
            with contextlib.suppress(psutil.Error):
                one.kill()


def _default_signals() -> None:
    """A shell lets programs in the background ignore Ctrl-C; here they must not."""
    for name in SIGNALS:
        if name != "KILL":
            signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_DFL)


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def _wait(done: Callable[[], bool], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.2)
