"""Errors: one class per exit code, so that a script around the trainer knows what went wrong.

0 done · 2 config or data · 3 storage · 4 numerics · 5 reward function · 130/143 stopped by a signal (saved first).
"""

import sys
from collections.abc import Callable


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


def run_main(main: Callable[[], object]) -> None:
    """Run a command: a GrpoError prints its message (not a traceback) and exits with its code."""
    try:
        main()
    except GrpoError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
