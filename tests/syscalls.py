"""Kill points: run a function in a child and kill it before its n-th call that changes the file system.

The system calls themselves are counted (ptrace), so Rust's and C's writes are seen as well as Python's, and a file that
somebody adds to a checkpoint is covered without a new test. Linux on x86-64; `available()` says whether it works here.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

TRACEME, PEEKUSER, CONT_SYSCALL, SETOPTIONS = 0, 3, 24, 0x4200
TRACESYSGOOD, EXITKILL = 1, 0x100000
ORIG_RAX = 15 * 8  # where the number of the system call stands in struct user
CHANGES = {
    **{1: "write", 18: "pwrite64", 20: "writev", 296: "pwritev", 40: "sendfile", 326: "copy_file_range"},
    **{74: "fsync", 75: "fdatasync", 77: "ftruncate", 285: "fallocate"},
    **{82: "rename", 264: "renameat", 316: "renameat2", 83: "mkdir", 258: "mkdirat"},
    **{87: "unlink", 263: "unlinkat", 84: "rmdir", 26: "msync"},
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def available() -> bool:
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        return False
    try:
        return killed_before(lambda: os.close(os.dup(1)), 0)[0] is False
    except OSError:
        return False


def killed_before(action: Callable[[], object], point: int) -> tuple[bool, list[str]]:
    """Return (True if it was killed, number of calls). It is not killed if `action` makes fewer than `point` calls."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if _libc.ptrace(TRACEME, 0, None, None) != 0:
                os._exit(99)
            os.kill(os.getpid(), signal.SIGSTOP)
            action()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        raise OSError("ptrace is not permitted here")
    _libc.ptrace(SETOPTIONS, child, None, TRACESYSGOOD | EXITKILL)
    calls: list[str] = []
    entering, deliver = True, 0
    while True:
        _libc.ptrace(CONT_SYSCALL, child, None, deliver)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            if status != 0:
                raise OSError(f"the child ended with status {status}")
            return False, calls
        deliver = os.WSTOPSIG(status)
        if deliver != signal.SIGTRAP | 0x80:
            continue  # a signal of its own, handed on
        deliver = 0
        if entering and (name := CHANGES.get(_libc.ptrace(PEEKUSER, child, ORIG_RAX, None))):
            calls.append(name)
            if len(calls) == point:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return True, calls
        entering = not entering
