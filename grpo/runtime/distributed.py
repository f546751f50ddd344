"""Distributed: the only collectives. One process or many, the rest of the code asks this file."""

import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import yaml
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch.distributed.fsdp import CPUOffloadPolicy

from grpo.errors import ConfigError, GrpoError
from grpo.runtime.exit import on_peer_timeout
from grpo.runtime.sums import Sums

Made = TypeVar("Made")

# Tensors of megabytes in pages of 2 MB, where the system hands them out (Linux): a page of 4 KB costs a microsecond or two when
# it is first touched. torch reads this once, at its first tensor on the CPU, so it is said here, as this file is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def start_accelerator(timeout: float = 1800.0) -> Accelerator:
    """The Accelerator that `accelerate launch` and its config file ask for. A rank that the others have waited for longer
    than `timeout` seconds ends the run.

    Raises ConfigError if fewer processes started than were asked for, or float16 was asked for on a CPU.
    """
    # Accelerate joins processes on a CPU only if it is told here too that they run on the CPU, and its launcher does not
    # hand `use_cpu` down to several processes: a machine without an accelerator leaves no other choice.
    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    on_cpu = asked_for_cpu or not torch.accelerator.is_available()
    if on_cpu and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise ConfigError(
            "mixed_precision is fp16, which accelerate computes on GPUs only, and this run is on the CPU: set it to bf16 or "
            '"no" in the file of --config_file, or with accelerate launch --mixed_precision'
        )
    if on_cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # How deepspeed_zero*.yaml is tested without a GPU. Accelerate would take `cpu` for plain DDP.
        patience.backend = "gloo"
        on_cpu = False
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[patience])
    asked = asked_processes()
    if accelerator.num_processes != asked:
        raise ConfigError(
            f"{asked} processes were asked for, {accelerator.num_processes} started. `accelerate launch --cpu` starts "
            f"only one, whatever --num_processes says: use --config_file accelerate_configs/cpu_2proc.yaml"
        )
    if accelerator.device.type == "cpu" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _shard_on_cpu(accelerator.mixed_precision)
    if accelerator.is_fsdp2:
        # Accelerate would have FSDP cast all weights, gradients and the logprobs that come out to 16 bits: the head, the norms and
        # the sums over ranks too. Under autocast, which casts what can stand it, sharded training is what DDP's is.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if accelerator.device.type == "cpu":
        torch.set_num_threads(cpu_threads(accelerator.num_processes))
    _BESIDE[:] = _others_here(accelerator)
    return accelerator


_BESIDE: list[psutil.Process] = []
"""The other ranks that the same launcher started on this machine."""


def _others_here(accelerator: Accelerator) -> list[psutil.Process]:
    if accelerator.num_processes == 1:
        return []
    mine = {"host": socket.gethostname(), "pid": os.getpid()}
    others = []
    for place in gather_rows(accelerator, [mine]):
        with contextlib.suppress(psutil.Error):
            if place["host"] == mine["host"] and place["pid"] != mine["pid"]:
                process = psutil.Process(place["pid"])
                if process.ppid() == os.getppid():  # and not a stranger with that number, in another container
                    others.append(process)
    return others


@on_peer_timeout
def end_others_here() -> None:
    """Kill the other ranks on this machine, for a rank that has waited for them in vain: one that hangs does not heed the
    launcher's SIGTERM, and the launcher gives it half a minute more."""
    for process in _BESIDE:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _shard_on_cpu(precision: str) -> None:
    """FSDP2 over gloo. Accelerate selects FSDP on accelerators only and would silently run DDP, though all of its FSDP2 path
    works on a CPU: this is how a machine without a GPU tests fsdp2.yaml."""
    plugin = FullyShardedDataParallelPlugin()
    if precision != "no":
        plugin.set_mixed_precision(precision)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # only an accelerator's driver can pin
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def asked_processes() -> int:
    """How many processes the launch asked for: WORLD_SIZE, or what the launcher's own command line says."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return 1
    if not any("accelerate" in Path(word).name for word in words[:4]):
        return 1
    asked = 1
    for word, value in zip(words, [*words[1:], ""], strict=True):
        key, _, inline = word.partition("=")
        value = inline or value
        if key in ("--num_processes", "--num-processes") and value.isdigit():
            return int(value)
        if key in ("--config_file", "--config-file") and Path(value).is_file():
            asked = int((yaml.safe_load(Path(value).read_text()) or {}).get("num_processes", 1))
        if word.endswith(".py"):
            break  # what follows belongs to the script
    return asked


def cpu_threads(processes_here: int) -> int:
    """Threads for each process: this machine's cores shared out. OMP_NUM_THREADS above 1 is somebody's choice, and
    stays; 1 is what `accelerate launch` sets when nobody chose."""
    chosen = int(os.environ.get("OMP_NUM_THREADS") or 1)
    if chosen > 1:
        return chosen
    cores = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else (os.cpu_count() or 1)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or processes_here))


def return_freed_memory(device: torch.device) -> None:
    """Hand the heap's freed pages back to the system at the end of a phase: glibc keeps them, in pieces that the next phase's
    tensors do not fit into, so that a process on a CPU grows from step to step. Elsewhere this does nothing."""
    if device.type == "cpu" and sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def from_main(accelerator: Accelerator, work: Callable[[], Made]) -> Made:
    """What `work` gives on the main process, on every process. An error of ours that it raises there, every process raises, so that
    nobody waits for the others in vain. Collective."""
    made: Made | GrpoError | None = None
    if accelerator.is_main_process:
        try:
            made = work()
        except GrpoError as error:
            made = error
    [made] = broadcast_object_list([made])
    if isinstance(made, GrpoError):
        raise made
    return made


def sum_over_ranks(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Element-wise sums of a list of numbers over all ranks, in float64."""
    if accelerator.num_processes == 1:
        return values
    on_mps = accelerator.device.type == "mps"
    total = torch.tensor(values, dtype=torch.float32 if on_mps else torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(total)
    return total.tolist()


def max_over_ranks(accelerator: Accelerator, value: int) -> int:
    if accelerator.num_processes == 1:
        return value
    largest = torch.tensor(value, device=accelerator.device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def merge_sums(accelerator: Accelerator, sums: Sums) -> None:
    """Add up the sums of every rank, in one collective. Every rank must hold the same names."""
    names = sums.names()
    flat = sum_over_ranks(accelerator, sums.tensor(names).flatten().tolist())
    sums.load(names, torch.tensor(flat, dtype=torch.float64).reshape(-1, 2))


def gather_rows(accelerator: Accelerator, rows: list[dict]) -> list[dict]:
    """Every rank's rows, on every rank, in rank order."""
    if accelerator.num_processes == 1:
        return rows
    parts: list[list[dict]] = [[] for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of the weights (FSDP, DeepSpeed)."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def compute_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """What mixed precision computes in; None where it is off."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
