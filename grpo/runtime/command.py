"""The runner of every command: exit codes, messages, what is closed at the end."""

import atexit
import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from grpo.errors import GrpoError
from grpo.runtime.exit import exit_is_blocked, force_exit, peer_timed_out
from grpo.runtime.messages import command_messages, rank_prefix
from grpo.runtime.redaction import redacted


def run_main(main: Callable[[], object]) -> None:
    """Run a command: keys are read from .env, messages of the logger `grpo` are shown. A GrpoError prints its message (not a
    traceback) and exits with its code."""
    atexit.register(settle, "stderr")  # what could not be told there is no failure
    with command_messages():
        _run(main)


def _run(main: Callable[[], object]) -> None:
    from grpo.runtime.env import load_keys

    try:
        load_keys()
        main()
        _leave_behind(0)
    except GrpoError as error:
        _tell(f"{rank_prefix()}error: {error}\n")
        _leave(error.exit_code)
    except Exception as error:
        _tell(f"{rank_prefix()}{_waited_in_vain(error)}{traceback.format_exc()}")
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


def _waited_in_vain(error: Exception) -> str:
    """A line for gloo's and NCCL's way of saying that another process did not come."""
    if not rank_prefix() or not re.search(r"timed out|connection (closed|reset)", str(error), re.IGNORECASE):
        return ""
    return (
        "error: another process died, or was waited for longer than rank_timeout: its own lines say why; one that wrote none "
        "hangs. Where a step or a save may take longer, raise rank_timeout. Go on with --resume auto. Where this one waited:\n"
    )


def _end_who_hangs(error: Exception) -> None:
    """After a timeout, not where a connection was closed: then the launcher knows already, and who is saving may finish."""
    if rank_prefix() and re.search(r"timed out|timeout", str(error), re.IGNORECASE):
        peer_timed_out()


def _leave(code: int) -> NoReturn:
    """With several processes, at once: waiting for the others would let them fail first, and louder, for want of this
    one, and the launcher ends them as soon as this one is gone."""
    if rank_prefix():
        force_exit(code)
    _leave_behind(code)
    raise SystemExit(code) from None


def _leave_behind(code: int) -> None:
    """Where a tracker does not answer: what W&B does when a program ends would wait for its server once more."""
    if exit_is_blocked():
        force_exit(code)
