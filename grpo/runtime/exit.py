"""Exit hooks: components register what the end of the process needs, so that the command runner knows none of them.

before_forced_exit   close child processes before `os._exit`, which runs no `atexit` handlers
prevents_exit        report a call that never returned: Python's own exit would wait for it
on_peer_timeout      act when another rank has been waited for in vain
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

_before_forced_exit: list[Callable[[], None]] = []
_prevents_exit: list[Callable[[], bool]] = []
_on_peer_timeout: list[Callable[[], None]] = []
_commands = 0
"""Commands that this process runs (grpo/runtime/command.py): 0 where a program or a notebook calls the functions."""


def before_forced_exit(hook: Callable[[], None]) -> Callable[[], None]:
    """Register a hook for `force_exit`. It must be quick and must not raise."""
    _before_forced_exit.append(hook)
    return hook


def prevents_exit(check: Callable[[], bool]) -> Callable[[], bool]:
    """Register a check that returns True while something would block Python's own exit."""
    _prevents_exit.append(check)
    return check


def on_peer_timeout(hook: Callable[[], None]) -> Callable[[], None]:
    """Register a hook for a collective that has timed out."""
    _on_peer_timeout.append(hook)
    return hook


@contextlib.contextmanager
def command() -> Iterator[None]:
    """Mark this process as one that exists for a command, which may therefore end it."""
    global _commands
    _commands += 1
    try:
        yield
    finally:
        _commands -= 1


def runs_command() -> bool:
    """Return whether this process runs a command of this package."""
    return _commands > 0


def exit_is_blocked() -> bool:
    """Return whether Python's own exit would wait for a call that never returns."""
    return any(check() for check in _prevents_exit)


def peer_timed_out() -> None:
    """Run the hooks for a collective that has timed out."""
    for hook in _on_peer_timeout:
        hook()


def force_exit(code: int) -> NoReturn:
    """End this process at once, its children first. A checkpoint that is being written is still under its temporary
    name, so none is torn."""
    for hook in reversed(_before_forced_exit):
        hook()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(
            OSError, ValueError, AttributeError, RuntimeError
        ):  # RuntimeError: in a handler that interrupted a print
            stream.flush()
    os._exit(code)
