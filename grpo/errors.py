"""Errors: one class per exit code, so that a script around the trainer knows what went wrong.

0 done · 2 config or data · 3 storage · 4 numerics · 5 reward function · 6 out of memory
7 rollout engine (saved first) · 130/143 stopped by a signal (saved first).
"""

import signal


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
    """The GPU, or the machine, has no room for this config; the message says what to change (grpo/runtime/oom.py)."""

    exit_code = 6


class EngineError(GrpoError):
    """An engine outside this process died, does not answer, or does not have the weights that it was sent."""

    exit_code = 7


class Mismatch(GrpoError):
    """A replay of a run gave something else than the run recorded (grpo verify). Exit code 1."""


class Interrupted(GrpoError):
    """A signal ended the run, after everything was saved. Exit code 130 for Ctrl-C, else 143."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 130 if number == signal.SIGINT else 143


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
_FATAL = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction",
    "invalid address space",
    "invalid program counter",
    "hardware stack error",
    "the launch timed out",
    "uncorrectable",  # ECC or NVLink
    "ECC error",
    "CUBLAS_STATUS_EXECUTION_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator of CUDA, of the CPU or of Python has failed."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY)


def is_fatal(error: BaseException) -> bool:
    """Return whether a GPU is unusable after `error`: every later call of this process would fail as well."""
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _FATAL)


def raise_device_error(error: BaseException) -> None:
    """Raise `error` again if it is a lack of memory or a failure of the device, which no fallback may hide."""
    if is_out_of_memory(error) or is_fatal(error):
        raise error
