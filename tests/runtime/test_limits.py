"""Limits of containers, batch systems and ulimit, from folders that look like those of the kernel."""

import os
from pathlib import Path

import pytest

from grpo.runtime import limits
from grpo.runtime.limits import available_memory, core_quotas, memory_limits, usable_cores

GIB = 2**30


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def proc(folder: Path, cgroup: str, *mounts: str) -> Path:
    """Write /proc/self/cgroup and mountinfo. A mount: "root mount-point type options"."""
    lines = []
    for mount in mounts:
        root, point, kind, options = mount.split()
        lines.append(f"30 23 0:26 {root} {point} rw,nosuid shared:9 - {kind} cgroup {options}")
    write(folder, cgroup=cgroup, mountinfo="\n".join(["22 1 8:1 / / rw - ext4 /dev/sda rw", *lines]))
    return folder


def test_version_2_and_the_groups_above(tmp_path: Path) -> None:
    """The lowest limit counts, wherever it is; "max" is none; droppable page cache is not used memory."""
    mount = tmp_path / "fs"
    write(mount / "slurm", memory__max=4 * GIB, memory__current=3 * GIB, memory__stat=f"anon 5\ninactive_file {GIB}")
    write(
        mount / "slurm" / "job", memory__max="max", memory__high=8 * GIB, memory__current=GIB, cpu__max="150000 100000"
    )
    write(mount / "slurm" / "job" / "step", memory__max="max", memory__current=GIB, cpu__max="max 100000")
    self = proc(tmp_path / "proc", "0::/slurm/job/step", f"/ {mount} cgroup2 rw")
    assert list(memory_limits(self))[:2] == [(8 * GIB, GIB), (4 * GIB, 2 * GIB)]
    assert list(core_quotas(self)) == [1.5]


@pytest.mark.parametrize(
    ("cgroup", "root"),
    [
        ("4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc", "/docker/abc"),  # Docker: the path is that of the host
        ("4:memory:/\n3:cpu,cpuacct:/", "/"),  # a namespace of its own
        ("4:memory:/kubepods/pod1/abc\n3:cpu,cpuacct:/kubepods/pod1/abc", "/kubepods/pod1"),
    ],
)
def test_version_1_inside_a_container(tmp_path: Path, cgroup: str, root: str) -> None:
    memory, cpu = tmp_path / "memory", tmp_path / "cpu"
    below = "abc" if root.endswith("pod1") else "."
    write(
        memory / below, memory__limit_in_bytes=GIB, memory__usage_in_bytes=700, memory__stat="total_inactive_file 200"
    )
    write(cpu / below, **{"cpu__cfs_quota_us": 200000, "cpu__cfs_period_us": 100000})
    mounts = (f"{root} {memory} cgroup rw,memory", f"{root} {cpu} cgroup rw,cpu,cpuacct")
    self = proc(tmp_path / "proc", cgroup, *mounts)
    assert next(iter(memory_limits(self))) == (GIB, 500)
    assert list(core_quotas(self)) == [2.0]


def test_no_limit_is_none(tmp_path: Path) -> None:
    write(tmp_path / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=5)
    write(tmp_path / "cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    mounts = (f"/ {tmp_path / 'memory'} cgroup rw,memory", f"/ {tmp_path / 'cpu'} cgroup rw,cpu")
    self = proc(tmp_path / "proc", "4:memory:/\n3:cpu:/", *mounts)
    assert [limit for limit, _ in memory_limits(self) if limit > 2**60] == []
    assert list(core_quotas(self)) == []
    assert list(core_quotas(tmp_path / "nothing")) == []


def test_the_smallest_limit_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_limits", lambda: iter([(5 * 10**6, 2 * 10**6), (9 * 10**6, 10**6)]))
    assert available_memory() == 3 * 10**6
    monkeypatch.setattr(limits, "memory_limits", lambda: iter([(5, 6)]))
    assert available_memory() == 0
    monkeypatch.setattr(limits, "core_quotas", lambda: iter([0.5]))
    assert usable_cores() == 1
    monkeypatch.setattr(limits, "core_quotas", lambda: iter([]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)), raising=False)
    assert usable_cores() == 7
    monkeypatch.setattr(limits, "core_quotas", lambda: iter([2.9]))
    assert usable_cores() == 2


def test_ulimit_v_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10**15, 10**15))
    [(limit, used)] = memory_limits(tmp_path)
    assert limit == 10**15 and used > 10**6
