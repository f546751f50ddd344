"""Errors: one class per exit code, so that a script around the trainer knows what went wrong.

0 done · 2 config or data · 3 storage · 4 numerics · 5 reward function · 6 out of memory · 7 rollout engine (saved first)
· 130/143 stopped by a signal (saved first).
"""

import atexit
import contextlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from grpo.redaction import redacted


class GrpoError(Exception):
    """An error whose message is meant for the person at the keyboard: what came, what is needed, what to change."""

    exit_code = 1


class ConfigError(GrpoError):
    """The config, the command line or the data cannot be used. Raised before any weight loads."""

    exit_code = 2


class StorageError(GrpoError):
    """A checkpoint or a run directory cannot be written, or is damaged."""

    exit_code = 3


class NumericsError(GrpoError):
    """A number that must be right is not: a positive logprob, a reference KL that is not 0 at the start, a NaN."""

    exit_code = 4


class RewardError(GrpoError):
    """A reward function raised, or returned something that is not one number (or None) per completion."""

    exit_code = 5


class OutOfMemory(GrpoError):
    """The GPU, or the machine, has no room for this config; the message says what to change (grpo/advice.py)."""

    exit_code = 6


class EngineError(GrpoError):
    """An engine outside this process died, does not answer, or does not have the weights that it was sent."""

    exit_code = 7


class Interrupted(GrpoError):
    """A signal ended the run, after everything was saved. Exit code 130 for Ctrl-C, else 143."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 130 if number == signal.SIGINT else 143


def run_main(main: Callable[[], object]) -> None:
    """Run a command: keys are read from .env; a GrpoError prints its message (not a traceback) and exits with its code."""
    from grpo.keys import load_keys

    atexit.register(settle, "stderr")  # what could not be told there is no failure
    try:
        load_keys()
        main()
        _leave_behind(0)
    except GrpoError as error:
        _tell(f"{_rank()}error: {error}\n")
        _leave(error.exit_code)
    except Exception as error:
        _tell(f"{_rank()}{_waited_in_vain(error)}{traceback.format_exc()}")
        _end_who_hangs(error)
        _leave(1)
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # one that is left open aborts the process at exit


def _tell(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk or a closed terminal
        sys.stderr.write(redacted(text))
        sys.stderr.flush()


def settle(name: str) -> None:
    """Before Python exits: where sys.stdout or sys.stderr cannot be written (a full disk), what is left in its buffer would fail once
    more, and the exit code be 120."""
    stream = getattr(sys, name)
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        silence(stream)


def silence(stream: Any) -> None:
    """Point what `stream` writes to at nothing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _rank() -> str:
    """ "[rank 1] " in a run of several processes."""
    return f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _waited_in_vain(error: Exception) -> str:
    """A line for gloo's and NCCL's way of saying that another process did not come."""
    if not _rank() or not re.search(r"timed out|connection (closed|reset)", str(error), re.IGNORECASE):
        return ""
    return (
        "error: another process died, or was waited for longer than rank_timeout: its own lines say why; one that wrote none "
        "hangs. Where a step or a save may take longer, raise rank_timeout. Go on with --resume auto. Where this one waited:\n"
    )


def _end_who_hangs(error: Exception) -> None:
    """After a timeout, not where a connection was closed: then the launcher knows already, and who is saving may finish."""
    distributed = sys.modules.get("grpo.distributed")
    if distributed is not None and _rank() and re.search(r"timed out|timeout", str(error), re.IGNORECASE):
        distributed.end_others_here()


def _leave(code: int) -> NoReturn:
    """With several processes, at once: waiting for the others would let them fail first, and louder, for want of this
    one, and the launcher ends them as soon as this one is gone."""
    if _rank():
        _at_once(code)
    _leave_behind(code)
    raise SystemExit(code) from None


def _leave_behind(code: int) -> None:
    """Where a tracker does not answer: what W&B does when a program ends would wait for its server once more."""
    courier = sys.modules.get("grpo.courier")
    if courier is not None and courier.one_is_left_behind():
        _at_once(code)


def _at_once(code: int) -> NoReturn:
    runner = sys.modules.get("grpo.rewards.runner")
    if runner is not None:
        runner.close_all()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
