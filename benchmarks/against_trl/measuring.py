"""Time, memory, profile and rates of the machine."""

import contextlib
import gc
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from against_trl.suites import Suite
from grpo.errors import ConfigError


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run `count` processes that compete for the cores. Each ends at the latest when this process ends."""
    loop = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(10000))"
    processes = [subprocess.Popen([sys.executable, "-S", "-c", loop]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def count_cpu_time() -> None:
    """Limit this process to one core, and let its clock count CPU time.

    Time spent waiting for other processes is then not counted. That is only our rewards, a few milliseconds.
    """
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    time.perf_counter = time.process_time


@contextlib.contextmanager
def profiled(suite: Suite, path: str | None, name: str) -> Iterator[None]:
    """Profile the code of the with block. Append its most expensive operations to `path`."""
    if path is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    on_cuda = suite.device == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=kinds, acc_events=True) as profiler:
        yield
    key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    with Path(path).open("a") as file:
        file.write(f"\n{name}: two steps under the profiler, which slows small operations down\n")
        file.write(profiler.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=48) + "\n")


def loaded_memory(device: str) -> float:
    """Return the GiB in use (on CUDA, allocated by torch), and reset the peak."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory(device: str) -> float:
    """Return the peak in GiB since `loaded_memory`."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return _status("VmHWM")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 2**20
    raise ConfigError("the benchmark reads memory from /proc: run it on Linux")


def machine_rates(suite: Suite, one_thread: bool) -> dict[str, float]:
    """Measure this machine: a large matrix product in the suite's precision, and a copy of memory."""
    import torch

    if one_thread:
        torch.set_num_threads(1)
    clock = time.process_time if one_thread else time.perf_counter
    device = torch.device(suite.device)
    dtype = torch.bfloat16 if suite.precision == "bf16" else torch.float32
    size, words = (8192, 2**28) if suite.device == "cuda" else (1024, 2**24)
    left = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.zeros(words, device=device)
    target = torch.empty_like(source)

    def best(call: Any) -> float:
        seconds = []
        for _ in range(8):
            started = clock()
            call()
            if suite.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - started)
        return min(seconds)

    return {
        "matrix_gflops": 2 * size**3 / best(lambda: left @ left) / 1e9,
        "copy_gb_per_second": 8 * words / best(lambda: target.copy_(source)) / 1e9,
    }
