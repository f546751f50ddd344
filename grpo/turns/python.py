"""Python: a tool that runs code of the model in a process of its own with limits. Off without turns.trust_model_code.

Limits: processor time, address space, size of files, number of processes and open files, and no variables of the
environment; the working directory is a new, empty folder. Where the system permits it, the process has no network (a
namespace of its own). This is no sandbox against an attacker: files that this user can read stay readable.
"""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile

from grpo.turns.tools import register_tool, runs_model_code

SECONDS = 5
MEMORY = 512 * 2**20
FILE_BYTES = 2**20
OUTPUT = 4000


@register_tool("python")
@runs_model_code
def python(code: str) -> str:
    """Run a Python program and return what it prints.

    Args:
        code: The program.
    """
    with tempfile.TemporaryDirectory(prefix="grpo-python-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", code],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": folder},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=SECONDS + 1,
                preexec_fn=_limit,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"the program ran for more than {SECONDS} s") from error
    text = done.stdout.decode(errors="replace")[-OUTPUT:]
    if done.returncode:
        raise RuntimeError(text.strip()[-500:] or f"the program ended with code {done.returncode}")
    return text


def _limit() -> None:
    """Set the limits, in the new process."""
    os.setsid()
    for kind, value in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    with contextlib.suppress(OSError, AttributeError):
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)  # type: ignore[attr-defined]  # Python 3.12, where permitted
