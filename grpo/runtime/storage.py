"""File operations that every file system has to support: what one of them refuses is given up, and said once.

sync(path)                  to disk, where the file system can
remove(path)                file, link or folder; what stays is left for later
replace_folder(new, old)    one folder for another, complete or not at all
share_mode(folder)          the mode of the umask, which some libraries narrow to the user alone
cache_folder()              a folder that can be written
"""

import contextlib
import errno
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_REFUSALS = ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EACCES", "EPERM", "EBADF", "EISDIR", "EROFS", "ENOTTY")
NOT_SUPPORTED = {getattr(errno, name) for name in _REFUSALS if hasattr(errno, name)}
"""Errors of fsync that say that the file system has none for this kind of file, not that the data is lost."""


_said: set[str] = set()


def warn_once(kind: str, text: str) -> None:
    """Log a warning, unless this process has logged one of this kind before."""
    if kind not in _said:
        _said.add(kind)
        log.warning(text)


def sync(path: Path) -> None:
    """Sync a file, or the list of names of a folder, to disk. A file system without this operation is named once.

    Raises:
        OSError: The data cannot be written (no space, an error of the device).
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        kind = "folders" if path.is_dir() else "files"
        warn_once(
            kind, f"the file system does not sync {kind} to disk ({error.strerror}): a power cut may lose the last save"
        )
    finally:
        os.close(handle)


def remove(path: Path) -> bool:
    """Remove a file, a folder or a link (not what it points to). Return False, with one warning, if something stays.

    A file that another machine has open stays on NFS under another name, and so does its folder.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
    except OSError as error:
        if os.path.lexists(path):
            warn_once(
                "remove", f"cannot remove {path}: {error.strerror or error}. It is left there, and training goes on"
            )
            return False
    return True


def unused_name(path: Path) -> Path:
    """Return `path`, or where that exists a name with a random ending."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}") if os.path.lexists(path) else path


def replace_folder(new: Path, old: Path) -> None:
    """Put the folder `new` in the place of `old`, which may not exist, or be a link. Both are on one file system."""
    if os.path.lexists(old):
        aside = unused_name(old.with_name(f".old-{old.name}"))
        os.replace(old, aside)
        os.replace(new, old)
        remove(aside)
    else:
        os.replace(new, old)


def share_mode(folder: Path) -> None:
    """Give the files and folders below `folder` the mode that a newly created file has here.

    safetensors and temporary folders make theirs readable for this user alone, whatever the umask.
    """
    with contextlib.suppress(OSError):
        probe = unused_name(folder / ".mode")
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) | mode | (mode & 0o444) >> 2)
        for path in folder.rglob("*"):
            if not path.is_symlink():
                now = stat.S_IMODE(path.stat().st_mode)
                path.chmod(now | mode | ((mode & 0o444) >> 2 if path.is_dir() else 0))


def cache_folders() -> Iterator[Path]:
    """Iterate over the folders that can hold the cache: GRPO_CACHE or ~/.cache/grpo, then a temporary one.

    Each of them can be written. A temporary folder belongs to this user alone.
    """
    named = os.environ.get("GRPO_CACHE")
    try:
        folder = Path(named).expanduser() if named else Path.home() / ".cache" / "grpo"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        yield folder
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home folder
        place = "GRPO_CACHE" if named else "~/.cache/grpo"
        log.info(
            "the cache %s cannot be written (%s): set GRPO_CACHE to a folder of yours. Using a temporary one",
            place,
            error,
        )
    temporary = Path(tempfile.gettempdir()) / f"grpo-cache-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    with contextlib.suppress(OSError):
        temporary.mkdir(mode=0o700, exist_ok=True)
        found = temporary.lstat()
        if stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid()):
            yield temporary


def cache_root() -> Path:
    """Return the folder of the cache by name, whether or not it can be written. None of it need exist."""
    named = os.environ.get("GRPO_CACHE")
    try:
        return Path(named).expanduser() if named else Path.home() / ".cache" / "grpo"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"grpo-cache-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
