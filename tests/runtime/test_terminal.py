"""Output in a terminal (a real pseudo-terminal), in a log file, and when memory runs out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grpo.trainer
from grpo.config.parser import load_config
from grpo.config.schema import Config
from grpo.errors import OutOfMemory, is_out_of_memory
from grpo.runtime.oom import memory_edits
from grpo.tracking.console import Display, sparkline
from tests.test_trainer import arguments

METRICS = {
    "reward/mean": 0.25,
    "eval/accuracy": 0.5,
    "rollout/length_mean": 118.4,
    "policy/kl": 0.0012,
    "rollout/tokens_per_second": 512.0,
    "memory/peak_gib": 2.05,
    "time/step": 20.0,
    "time/rollout": 12.0,
    "time/update": 8.0,
}
PROGRAM = f"""
from grpo.tracking.console import Display
display = Display(10, 0)
for step in range(1, 11):
    display.step(step, {METRICS!r} | {{"reward/mean": step / 10}})
display.table({{"eval/accuracy": 0.25}}, {{"eval/accuracy": 0.5}}, "outputs/x")
"""


def test_sparkline() -> None:
    assert sparkline([0.0, 1.0, 3.5, 7.0]) == "▁▂▅█" and sparkline([2.0, 2.0]) == "▁▁"


def test_the_first_step_says_how_long_the_rest_takes(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(total_steps=11, start=0)
    display.step(1, METRICS)
    display.step(2, METRICS)
    out = capsys.readouterr().out
    assert out.count("step 1 took 20.0 s; about 3 min left (without evaluations)") == 1
    resumed = Display(total_steps=11, start=5)
    resumed.step(6, METRICS)
    assert "step 6 took 20.0 s; about 2 min left (without evaluations)" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_terminal_that_cannot_move_its_cursor_gets_lines() -> None:
    """TERM=dumb: Emacs, CI services, `ssh -t` from a job. The live view would show nothing until the end."""
    pexpect = pytest.importorskip("pexpect", reason='pip install -e ".[test]"')
    variables = os.environ | {"TERM": "dumb"}
    program = PROGRAM.split("display.table")[0] + "input()\n"  # still running
    root = Path(__file__).parents[2]
    screen = pexpect.spawn(sys.executable, ["-c", program], cwd=root, env=variables, encoding="utf-8", timeout=120)
    screen.expect("step 1/10: reward 0.10")
    screen.expect("step 10/10: reward 1.00")
    screen.sendline()
    screen.expect(pexpect.EOF)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_live_view_in_a_real_terminal() -> None:
    pexpect = pytest.importorskip("pexpect", reason='pip install -e ".[test]"')
    root = Path(__file__).parents[2]
    screen = pexpect.spawn(
        sys.executable, ["-c", PROGRAM], cwd=root, dimensions=(30, 120), encoding="utf-8", timeout=120
    )
    screen.expect(pexpect.EOF)
    screen.close()
    shown = screen.before
    assert screen.exitstatus == 0
    assert "step 1 took 20.0 s; about 3 min left (without evaluations)" in shown
    assert "step 10/10" in shown and "━" in shown
    assert "reward 1.000 ▁▂▃▃▄▅▆▆▇█   held-out accuracy 0.500 (step 10)" in shown
    assert "length 118   KL 0.0012" in shown and "512 tokens/s   2.0 GiB   rollout 60%   update 40%" in shown
    assert "\x1b[?25l" in shown and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor comes back
    assert "+0.250" in shown


def test_out_of_memory_says_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real allocation error in a run."""
    monkeypatch.setattr(grpo.trainer, "importance_correction", lambda *_, **__: torch.empty(1 << 50))
    settings = {"eval_every": 0, "rollout.slots": 64, "scoring.workers": 0}
    with pytest.raises(OutOfMemory) as caught:
        grpo.trainer.train(load_config(arguments(tmp_path, "run", **settings)))
    message = str(caught.value)
    assert caught.value.exit_code == 6 and "out of memory while learning" in message and "--resume auto" in message
    assert "1. --tokens_per_batch 520 (now 1024)" in message  # 512 + 8: one prompt and one completion must fit
    assert "2. --model.gradient_checkpointing true" in message
    assert "3. --lora.r 16 (now off)" in message and "4. --model.reference_offload true" in message


def test_advice_depends_on_what_was_done_already() -> None:
    config = Config()
    assert memory_edits(config, "sampling")[0].startswith("--rollout.slots 128 (now 256)")
    assert memory_edits(config, "loading")[0].startswith("--lora.r 16")
    config.lora.r, config.model.gradient_checkpointing, config.tokens_per_batch = 16, True, 1024
    edits = memory_edits(config, "learning")
    assert edits[0].startswith("--sampling.max_completion_length 384 (now 512)")
    for phase in ("loading", "sampling", "evaluating", "learning"):
        assert len(memory_edits(Config(), phase)) == 4
    assert not any("lora" in edit or "tokens_per_batch" in edit for edit in edits)


def test_what_is_out_of_memory_and_what_is_not() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied")) and not is_out_of_memory(ValueError())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("from grpo.tracking.console import Display; Display(1); print('left in the buffer')", 0),
        ("print('the result of a command that is no training')", 120),
        (
            "import warnings; from grpo.runtime.command import run_main; run_main(lambda: warnings.warn('nobody "
            "reads this'))",
            0,
        ),
        (
            "import warnings; from grpo.errors import *; from grpo.runtime.command import run_main; "
            "run_main(lambda: exec('raise ConfigError'))",
            2,
        ),
    ],
)
def test_what_a_full_disk_does_not_take_changes_no_exit_code(program: str, code: int) -> None:
    """A saved run exits with 0, although Python would exit with 120 if standard output cannot be written."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full, env=buffered)
    assert done.returncode == code
