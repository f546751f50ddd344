"""Threads and memory of the machine."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo.runtime import device
from grpo.runtime.device import (
    SideStream,
    attention_backends,
    attention_off,
    configure,
    cpu_threads,
    describe_devices,
    device_names,
    free_memory,
    matmul_note,
    peak_memory,
    torch_defaults,
    widest_float,
)

CPU = torch.device("cpu")


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cpu_threads(1) == cores
    assert cpu_threads(cores) == 1
    for chosen in (1, 3):
        monkeypatch.setenv("OMP_NUM_THREADS", str(chosen))
        assert cpu_threads(2) == chosen


@pytest.mark.parametrize("chosen", [None, "1", "3"])
def test_one_thread_is_a_choice_unless_the_launcher_made_it(tmp_path: Path, chosen: str | None) -> None:
    """A launcher as `accelerate launch` is: it sets OMP_NUM_THREADS to 1 where the variable is not set."""
    launcher = tmp_path / "accelerate"
    launcher.write_text(
        "import os, subprocess, sys\nos.environ.setdefault('OMP_NUM_THREADS', '1')\n"
        "subprocess.run([sys.executable, '-c', 'from grpo.runtime.device import cpu_threads; print(cpu_threads(1))'])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": chosen} if chosen else {}
    done = subprocess.run([sys.executable, launcher], env=environment, capture_output=True, text=True)
    assert int(done.stdout) == int(chosen or len(os.sched_getaffinity(0))), done.stderr


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


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="GPU A", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    assert describe_devices() == ["GPU A (compute capability 9.0, 80.0 GiB)"] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert describe_devices() == ["cpu"]


def test_cudnn_attention_and_tf32_in_convolutions_are_off_on_a_gpu() -> None:
    before, tf32 = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32
    try:
        configure(torch.device("cuda", 0))  # flags of torch, which need no GPU
        assert attention_backends(torch.device("cuda", 0)) == ["flash", "memory-efficient", "math"]
        assert attention_backends(CPU) == [] and attention_off(CPU) == {}
        assert list(attention_off(torch.device("cuda", 0))) == ["cuDNN"]
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
        torch.backends.cudnn.allow_tf32 = tf32


def test_the_log_says_if_float32_products_are_rounded() -> None:
    assert matmul_note() == ""
    torch.set_float32_matmul_precision("high")
    try:
        assert "float32 products at precision high" in matmul_note()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_limits_of_a_container_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory", lambda: 5)
    monkeypatch.setattr(device, "usable_cores", lambda: 6)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert free_memory(CPU) == 5 and cpu_threads(2) == 3
    assert (free_memory(CPU, 2), free_memory(CPU, 100)) == (3, 1)  # what else will be needed leaves a quarter
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    assert cpu_threads(2) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert cpu_threads(2) == 4


def test_settings_of_the_calling_program_do_not_change_the_run() -> None:
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        with torch.no_grad(), torch.autocast("cpu"):
            with torch_defaults():
                value = torch.ones(2, 2, requires_grad=True)
                product = value @ value
                assert value.dtype == product.dtype == torch.float32 and value.device.type == "cpu"
                assert product.requires_grad
            assert torch.get_default_dtype() == torch.bfloat16 and torch.get_default_device().type == "meta"
            assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
        with torch.inference_mode(), torch_defaults():
            assert not torch.is_inference_mode_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
