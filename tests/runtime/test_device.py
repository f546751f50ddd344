"""Threads and memory of the machine."""

import os

import pytest
import torch

from grpo.runtime.device import SideStream, cpu_threads, device_names, free_memory, peak_memory, widest_float

CPU = torch.device("cpu")


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what accelerate launch sets when nobody chose
    assert cpu_threads(1) == cores
    assert cpu_threads(cores) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpu_threads(2) == 3


def test_memory_of_this_process() -> None:
    before = peak_memory(CPU)
    block = torch.ones(2**24)  # 64 MiB, touched
    assert peak_memory(CPU) >= max(before, block.nbytes)
    assert free_memory(CPU) > 0


def test_a_cpu_has_no_stream_and_every_dtype() -> None:
    stream = SideStream(CPU)
    stream.wait_for_default()
    with stream.use():
        assert float(torch.ones(2).sum()) == 2
    assert widest_float(CPU) == torch.float64 and widest_float(torch.device("mps")) == torch.float32
    assert device_names()
