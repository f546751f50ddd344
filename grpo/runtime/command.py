"""Command runner: environment keys, error messages, exit codes, cleanup."""

import atexit
import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from grpo.errors import GrpoError, StorageError
from grpo.runtime.env import drop_empty_variables, load_keys
from grpo.runtime.exit import command, exit_is_blocked, force_exit, peer_timed_out
from grpo.runtime.messages import command_messages, rank_prefix
from grpo.runtime.redaction import redacted

_NAMES = ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "ESTALE", "EIO", "ENAMETOOLONG", "ELOOP", "EMFILE", "ENFILE")
STORAGE_ERRORS = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}
"""Refusals of a file system or of the system's limits: the cause is the machine, and a traceback says nothing more."""
_OWN_FOLDER = "Use a folder that this user can read and write, with free space"


def run_main(main: Callable[[], object]) -> None:
    """Run the main function of a command.

    Reads keys from .env and shows the messages of the logger `grpo`. A GrpoError prints its message instead of a
    traceback, and its exit code becomes that of the process.
    """
    atexit.register(flush_at_exit, "stderr")
    drop_empty_variables()
    with command(), command_messages():
        _run(main)


def _run(main: Callable[[], object]) -> None:
    try:
        load_keys()
        main()
        _exit_if_blocked(0)
    except GrpoError as error:
        _print_error(f"{rank_prefix()}error: {error}\n")
        _exit(error.exit_code)
    except KeyboardInterrupt:
        _print_error(f"{rank_prefix()}stopped by SIGINT\n")
        _exit(130)
    except OSError as error:
        if error.errno not in STORAGE_ERRORS or error.filename is None:
            _unexpected(error)
        _print_error(f"{rank_prefix()}error: cannot read or write {error.filename}: {error.strerror}. {_OWN_FOLDER}\n")
        _exit(StorageError.exit_code)
    except Exception as error:
        _unexpected(error)
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # an open process group aborts the process at exit


def _unexpected(error: Exception) -> NoReturn:
    """Exit with code 1 after an error that is no message for the user, with its traceback."""
    _print_error(f"{rank_prefix()}{_peer_failure(error)}{traceback.format_exc()}")
    if rank_prefix() and re.search(r"timed out|timeout", str(error), re.IGNORECASE):
        # Not for a closed connection: the launcher knows of it already, and a process that is saving can finish.
        peer_timed_out()
    _exit(1)


def flush_at_exit(name: str) -> None:
    """Flush sys.stdout or sys.stderr, and discard a buffer that cannot be written (a full disk).

    Python would flush it again at exit, fail, and exit with code 120.
    """
    stream = getattr(sys, name)
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        redirect_to_devnull(stream)


def redirect_to_devnull(stream: Any) -> None:
    """Discard everything that is written to the file descriptor of `stream` from now on."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk or a closed terminal
        sys.stderr.write(redacted(text))
        sys.stderr.flush()


def _peer_failure(error: Exception) -> str:
    """Return an explanation for the errors with which gloo and NCCL report that another process is gone; else ""."""
    if not rank_prefix() or not re.search(r"timed out|connection (closed|reset)", str(error), re.IGNORECASE):
        return ""
    return (
        "error: another process died, or did not answer within rank_timeout. Its own output says why; a process "
        "without output hangs. If a step or a save may take longer, raise rank_timeout. Continue with --resume auto. "
        "This process waited here:\n"
    )


def _exit(code: int) -> NoReturn:
    """Exit. With several processes at once: the launcher then ends the others before they report this one's loss."""
    if rank_prefix():
        force_exit(code)
    _exit_if_blocked(code)
    raise SystemExit(code) from None


def _exit_if_blocked(code: int) -> None:
    """Exit at once if Python's own exit would wait for a call that never returns (of a tracker without its server)."""
    if exit_is_blocked():
        force_exit(code)
