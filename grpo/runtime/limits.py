"""Limits of this process: memory and cores that a container, a batch system or `ulimit` leaves of the machine.

A machine reports all its memory inside a container. The limits are in the control groups: each group from that of
this process up to the root may have one. Linux has two versions, which can be mounted at the same time.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_UNLIMITED = 1 << 60
"""Version 1 writes about 2**63 where no limit is set."""


def available_memory() -> int:
    """Return the bytes that this process can still allocate, by the machine and by each limit on this process."""
    free = psutil.virtual_memory().available
    for limit, used in memory_limits():
        free = min(free, limit - used)
    return max(0, free)


def usable_cores() -> int:
    """Return the number of cores that this process may use: its affinity, and the quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    for quota in core_quotas():
        cores = min(cores, int(quota))
    return max(1, cores)


def memory_limits(proc: Path = Path("/proc/self")) -> Iterator[tuple[int, int]]:
    """Iterate over (limit, used) in bytes: of each control group above this process, and of `ulimit -v`.

    Page cache that the kernel drops under pressure does not count as used.
    """
    for version, group in _groups("memory", proc):
        names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
        limits = [value for name in names if (value := _number(group / name)) is not None]
        used = _number(group / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
        if used is None or not limits or min(limits) >= _UNLIMITED:
            continue
        cache = _field(group / "memory.stat", "inactive_file" if version == 2 else "total_inactive_file")
        yield int(min(limits)), int(max(0, used - cache))
    with contextlib.suppress(ImportError, OSError, ValueError, psutil.Error):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit, psutil.Process().memory_info().vms


def core_quotas(proc: Path = Path("/proc/self")) -> Iterator[float]:
    """Iterate over the quotas of processor time, in cores, of each control group above this process."""
    for version, group in _groups("cpu", proc):
        if version == 2:
            words = _text(group / "cpu.max").split()
            quota, period = (words[0], words[1]) if len(words) == 2 else ("max", "1")
        else:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        with contextlib.suppress(ValueError, ZeroDivisionError):
            if float(quota) > 0:
                yield float(quota) / float(period)


def _groups(controller: str, proc: Path) -> Iterator[tuple[int, Path]]:
    """Iterate over (version, folder) of the control groups of a controller, from this process's up to the root.

    Inside a container, the mount begins at the container's group, which the path of the process may not show.
    """
    if not sys.platform.startswith("linux"):
        return
    paths: dict[int, str] = {}
    for line in _text(proc / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = path
        elif controller in controllers.split(","):
            paths[1] = path
    for line in _text(proc / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if kind[0] == "cgroup2" else 1
        if version not in paths or (version == 1 and controller not in kind[-1].split(",")):
            continue
        root, mount = fields[3], Path(fields[4].replace("\\040", " "))
        below = _below(paths[version], root)
        group = mount / below if (mount / below).is_dir() else mount
        yield version, group
        for parent in group.parents:
            if group == mount or not parent.is_relative_to(mount):
                break
            yield version, parent


def _below(path: str, root: str) -> str:
    """Return `path` relative to the root of a mount; "" if it is not below it."""
    if root == "/":
        return path.strip("/")
    return path.removeprefix(root).strip("/") if f"{path}/".startswith(f"{root}/") else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    """Return the number in a file; None without the file, and for "max"."""
    try:
        return float(_text(path))
    except ValueError:
        return None


def _field(path: Path, name: str) -> int:
    """Return a number of a file with lines "name number"; 0 without it."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0
