"""One worker process for one reward function: started on demand, killed at its deadline, started again.

Neither an endless loop in C code nor 9**9**9**9 can be stopped from inside a process, so rewards run in others.
"""

import atexit
import contextlib
import dataclasses
import faulthandler
import fcntl
import io
import json
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from grpo.errors import ConfigError, RewardError
from grpo.registry import Registry
from grpo.rewards.calls import values_or_error
from grpo.rewards.context import Notes, TrainerState, context_arguments
from grpo.rewards.registry import REWARDS, RewardFunction
from grpo.rewards.sources import source_hashes
from grpo.runtime.signals import CAUGHT

MAX_TEMPORARY_PATH = 60
"""Bytes of the temporary folder; multiprocessing adds about 35, and macOS takes 103 in all."""
START_TIMEOUT = 120.0
"""Seconds for a worker to start and to import the file of its reward."""

ENDED = "ended its process"
"""Beginning of the reason for a process that died."""
PARENT_SECONDS = 1.0
"""Seconds between two checks whether the parent is alive."""

_STARTING = threading.Lock()
_TRAINER_ENDS: "weakref.WeakSet[Connection]" = weakref.WeakSet()
"""The trainer's ends of all pipes. A forked worker inherits them and closes its copies: otherwise no worker would see
its pipe close when the trainer ends."""


class Worker:
    """One process that holds one reward.

    Args:
        name: The reward's name.
        function: The reward.
        kwargs: Keyword arguments of the function from `reward_kwargs`; plain values.
    """

    def __init__(self, name: str, function: RewardFunction, kwargs: dict[str, Any]):
        self.name, self.function, self.kwargs = name, function, kwargs
        self._sources = source_hashes([function])
        self._process: Any = None
        self._pipe: Connection | None = None

    def start(self) -> None:
        """Start the process unless it is alive, and wait until it is ready.

        Raises:
            RewardError: The process does not start.
        """
        if self._process is not None and self._process.is_alive():
            return
        self.kill()
        address = address_of(self.function)
        # The fork server has imported this module only. Forking this process would copy the locks of its threads; it is
        # done only for a function that no other process can import (one from a notebook).
        context: Any = multiprocessing.get_context("fork" if address is None else _start_method())
        if address is not None and _start_method() == "forkserver":
            context.set_forkserver_preload(["grpo.rewards.worker_process"])
        reward = self.function if address is None else address
        # One at a time: a worker that is forked before theirs.close() would inherit `theirs`, and its open copy would
        # hide the end of this process.
        with _STARTING:
            self._pipe, theirs = multiprocessing.Pipe()
            _TRAINER_ENDS.add(self._pipe)
            arguments = (theirs, reward, self.kwargs)
            self._process = context.Process(target=serve, args=arguments, name=f"reward {self.name}")
            _use_short_socket_paths()
            with _flushable_streams(), contextlib.nullcontext() if address is None else _hidden_main_module():
                self._process.start()
            theirs.close()
        try:
            loaded = json.loads(self._pipe.recv_bytes()) if self._pipe.poll(START_TIMEOUT) else None
        except (EOFError, OSError):
            loaded = None
        if loaded is None:
            raise RewardError(f"reward '{self.name}': its process does not start ({self.exit_reason()})")
        self._check_sources(loaded)

    def _check_sources(self, loaded: dict[str, str]) -> None:
        """Raise RewardError if a file that the reward was loaded from has changed since the run began."""
        for file, sha256 in loaded.items():
            if self._sources.setdefault(file, sha256) != sha256:
                self.kill()
                raise RewardError(
                    f"reward '{self.name}': {file} was changed during the run (sha256 {self._sources[file][:12]} -> "
                    f"{sha256[:12]}), so its restarted process would judge by another rule. Put the old file back, or "
                    f"go on with the new one: --resume auto --allow_changes '[rewards]'"
                )

    def send(self, arguments: dict[str, list[Any]], state: TrainerState, seconds: float) -> None:
        """Send a request, starting the process first where needed. `seconds`: the deadline of the request."""
        self.start()
        assert self._pipe is not None
        self._pipe.send((arguments, dataclasses.asdict(state), seconds))

    def receive(self, seconds: float) -> tuple[list[float | None | str] | str, Notes] | None:
        """Wait for the answer to the last request.

        Returns:
            The values, or one error text for all of them, and what the reward recorded. None if the deadline has
            passed.

        Raises:
            EOFError: The process has ended.
        """
        assert self._pipe is not None
        if not self._pipe.poll(seconds):
            return None
        # JSON, not pickle: data from a reward process is not trusted.
        answer, metrics, extra = json.loads(self._pipe.recv_bytes())
        return answer, Notes(metrics, {column: dict(enumerate(values)) for column, values in extra.items()})

    def exit_reason(self) -> str:
        """Return how the process ended, and clear it away."""
        process = self._process
        code = None
        if process is not None:
            process.join(1.0)
            code = process.exitcode
        self.kill()
        if code is not None and code < 0:
            return f"{ENDED} by {signal.Signals(-code).name}"
        return f"{ENDED} (exit code {code})"

    def kill(self) -> None:
        """Kill the process and whatever it has started."""
        process, self._process = self._process, None
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            pipe.close()
        if process is None or process.pid is None:  # never started: the error that prevented it is already raised
            return
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # the worker leads a process group of its own
        process.kill()
        process.join()
        process.close()


def serve(pipe: Connection, reward: str | RewardFunction, kwargs: dict[str, Any]) -> None:
    """Main function of a worker process: answer requests until the pipe closes.

    Args:
        pipe: Receives (arguments, deadline in seconds); sends the values as JSON.
        reward: The function, or its address (see `address_of`).
        kwargs: Keyword arguments of the function.
    """
    for inherited in list(_TRAINER_ENDS):
        inherited.close()
    if not isinstance(reward, str):
        _close_inherited_pipes()
    with contextlib.suppress(OSError):
        os.setsid()
    for number in CAUGHT:
        signal.signal(number, signal.SIG_IGN)  # the trainer handles Ctrl-C: it saves first, and still needs the rewards
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    sys.stdout, sys.stderr = _ForgivingStream(sys.stdout), _ForgivingStream(sys.stderr)
    function: Callable[..., Any] = REWARDS.get(reward) if isinstance(reward, str) else reward
    pipe.send_bytes(json.dumps(source_hashes([function]) if isinstance(reward, str) else {}).encode())
    with open(os.devnull, "w") as devnull:
        while True:
            try:
                arguments, state, seconds = pipe.recv()
            except (EOFError, OSError):
                return
            # If the trainer is gone by then, this ends the process even inside C code that never returns.
            faulthandler.dump_traceback_later(seconds + 10, exit=True, file=devnull)
            notes = Notes()
            given = {**kwargs, **context_arguments(function, TrainerState(**state), notes)}
            answer = values_or_error(function, arguments, given)
            faulthandler.cancel_dump_traceback_later()
            extra = {column: list(values.values()) for column, values in notes.extra.items()}
            try:
                pipe.send_bytes(json.dumps([answer, notes.metrics, extra], default=str).encode())
            except OSError:
                return


def _close_inherited_pipes() -> None:
    """Close what a forked process has inherited of pipes that other threads of the trainer write to or hand on.

    A thread that runs a program (a compiler, or `ctypes.util.find_library`) opens such a pipe, and reads it to its end:
    with a copy in this process, it would wait until this process ends.
    """
    mine = {0, 1, 2, getattr(resource_tracker._resource_tracker, "_fd", None)}
    folder = Path("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")
    for number in {int(file.name) for file in folder.iterdir()} - mine:
        with contextlib.suppress(OSError):  # the folder's own descriptor is closed by now
            is_writer = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
            if is_writer and stat.S_ISFIFO(os.fstat(number).st_mode):
                os.close(number)


def _end_with_parent(parent: int) -> None:
    """End this process soon after its parent: a forked worker may have inherited the other end of its own pipe."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def _use_short_socket_paths() -> None:
    """Keep the socket of the fork server out of a long TMPDIR: the system takes paths of about 100 bytes."""
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if "tempdir" in settings or len(os.fsencode(tempfile.gettempdir())) <= MAX_TEMPORARY_PATH or os.name == "nt":
        return
    folder = tempfile.mkdtemp(prefix="grpo-", dir="/tmp")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    settings["tempdir"] = folder


def address_of(function: Callable[..., Any], registry: Registry[Any] = REWARDS) -> str | None:
    """Return the address for other processes, "package.module:name" or "/path/file.py:name"; None without one.

    Args:
        function: A function or a class.
        registry: Its registry, which has to find it there.
    """
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    name = getattr(function, "__qualname__", "")
    if module is None or module.__name__ == "__main__":
        return None
    place = str(module.__file__) if module.__name__.startswith("grpo_file_") else module.__name__
    try:
        return f"{place}:{name}" if registry.get(f"{place}:{name}") is function else None
    except ConfigError:
        return None


@contextlib.contextmanager
def _flushable_streams() -> Iterator[None]:
    """Hide standard streams that cannot be flushed (a full disk). Starting a process flushes them, and would fail."""
    hidden = {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            stream.flush()
        except AttributeError:  # closed: there is none
            continue
        except (OSError, ValueError):
            hidden[name] = stream
            setattr(sys, name, io.StringIO())
    try:
        yield
    finally:
        for name, stream in hidden.items():
            setattr(sys, name, stream)


@contextlib.contextmanager
def _hidden_main_module() -> Iterator[None]:
    """Keep a new process from importing the user's script, which would train there again without a `__main__` guard.

    The reward is found by its address. multiprocessing takes the script from `__file__` and `__spec__` of `__main__`.
    """
    main = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.pop("__spec__")
        main.update(hidden)


def _start_method() -> str:
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class _ForgivingStream:
    """Output stream of a reward that prints: a full disk or a closed terminal must not fail the reward."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
