"""Run lock: one process at a time writes a run directory.

Two locks, because neither is enough alone:

    .lock    held with flock: the system releases it when its holder dies. Some file systems have none, or keep it to
             one machine (Lustre, many NFS and FUSE mounts)
    .owner   created exclusively, with host, process and a token; its holder changes its time every few seconds. On
             the same machine the process says whether it still holds, elsewhere the time does
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, TextIO

import psutil

from grpo.errors import ConfigError, StorageError
from grpo.runtime.storage import warn_once

log = logging.getLogger(__name__)

_NAME, _OWNER = ".lock", ".owner"
HEARTBEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0
"""An owner on another machine that has not changed its file for so long has died."""


_silent: dict[Path, int] = {}
"""Owner file -> its time when it was found not to change."""


class LockLost(StorageError):
    """Another process has taken the run directory over."""


class RunLock:
    """Lock that is held from construction until `release`.

    Raises:
        ConfigError: Another process holds it.
        OSError: The run directory cannot be written.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._token = uuid.uuid4().hex
        self._released = threading.Event()
        self._file: TextIO | None = (run_dir / _NAME).open("a+", encoding="utf-8")
        try:
            if not _flock(self._file):
                raise ConfigError(_in_use(run_dir))
            self._own()
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
            self._file.flush()
        except BaseException:
            self._file.close()
            raise
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def check(self) -> None:
        """Raise LockLost if another process has taken the run directory (this one may have been suspended)."""
        owner = _read_owner(self.run_dir / _OWNER)
        if not self._released.is_set() and owner is not None and owner.get("token") != self._token:
            raise LockLost(
                f"run_dir {self.run_dir} was taken over by {_who(owner)} while this process did not answer. Nothing "
                "more is written here: use one process per run_dir"
            )

    def release(self) -> None:
        """Release the lock. Idempotent."""
        file, self._file = self._file, None
        if file is None:
            return
        self._released.set()
        owner = _read_owner(self.run_dir / _OWNER)
        if owner is not None and owner.get("token") == self._token:
            with contextlib.suppress(OSError):
                (self.run_dir / _OWNER).unlink()
        file.close()

    def _own(self) -> None:
        """Create .owner, in place of one whose process has died."""
        path = self.run_dir / _OWNER
        for _ in range(5):
            try:
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                owner = _living_owner(self.run_dir)
                if owner is not None:
                    raise ConfigError(_in_use(self.run_dir, owner)) from None
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            except OSError as error:  # the disk is full: flock alone has to do
                warn_once("owner", f"cannot write {path}: {error.strerror}. Only flock guards this run directory")
                return
            try:
                os.write(handle, json.dumps(_me() | {"token": self._token}).encode())
            except OSError as error:
                warn_once("owner", f"cannot write {path}: {error.strerror}. Only flock guards this run directory")
            finally:
                os.close(handle)
            owner = _read_owner(path)
            if owner is None or owner.get("token") == self._token:
                return
        raise ConfigError(_in_use(self.run_dir, _read_owner(path)))

    def _beat(self) -> None:
        path = self.run_dir / _OWNER
        while not self._released.wait(HEARTBEAT_SECONDS):
            owner = _read_owner(path)
            if owner is not None and owner.get("token") == self._token:
                with contextlib.suppress(OSError):
                    os.utime(path)


def check_free(run_dir: Path) -> None:
    """Raise ConfigError if another process writes this run directory. Creates no file."""
    path = run_dir / _NAME
    with contextlib.suppress(PermissionError):  # a run of another user that is only read; writing will say so
        if path.is_file():
            with path.open("a+", encoding="utf-8") as file:
                if not _flock(file):
                    raise ConfigError(_in_use(run_dir))
    owner = _living_owner(run_dir)
    if owner is not None:
        raise ConfigError(_in_use(run_dir, owner))


def _flock(file: TextIO) -> bool:
    """Take the lock. True also where there is none: .owner decides then."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _me() -> dict[str, Any]:
    """Return what identifies this process."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": psutil.Process().create_time(),
        "machine": _machine(),
    }


def _machine() -> str | None:
    """Return what two processes share if they see each other's numbers: this boot and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _read_owner(path: Path) -> dict[str, Any] | None:
    """Return the content of .owner: {} where it is still empty or damaged, None where there is none."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return owner if isinstance(owner, dict) else {}
    except ValueError:
        return {}
    except OSError:
        return None


def _living_owner(run_dir: Path) -> dict[str, Any] | None:
    """Return the owner of a run directory that is alive; None without one.

    On another machine (or for an owner that does not say) its file is watched: for at most SILENT_SECONDS.
    """
    path = run_dir / _OWNER
    owner = _read_owner(path)
    if owner is None:
        return None
    here = _machine()
    if owner.get("machine") == here and (here is not None or owner.get("host") == socket.gethostname()):
        return owner if _is_alive(owner) else None
    try:
        seen = path.stat().st_mtime_ns
    except OSError:
        return None
    # Clocks of a cluster differ by less than that. A file that was watched before is not watched again.
    if abs(time.time() - seen / 1e9) > 20 * SILENT_SECONDS or _silent.get(path) == seen:
        return None
    log.info("run_dir %s was last used by %s: waiting whether it is still at work", run_dir, _who(owner))
    end = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, SILENT_SECONDS / 10))
        try:
            if path.stat().st_mtime_ns != seen:
                return _read_owner(path)
        except OSError:  # released
            return None
    _silent[path] = seen
    return None


def _is_alive(owner: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(owner["pid"]))
        same = abs(process.create_time() - float(owner["started"])) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.Error, KeyError, ValueError, TypeError):
        return False


def _in_use(run_dir: Path, owner: dict[str, Any] | None = None) -> str:
    if owner is None:
        try:
            owner = json.loads((run_dir / _NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            owner = None
    return f"run_dir {run_dir} is in use by {_who(owner)}: wait for it, stop it, or choose another --run_dir"


def _who(owner: Any) -> str:
    try:
        return f"process {owner['pid']} on {owner['host']}"
    except (KeyError, TypeError):
        return "another process"
