"""Device: threads, streams, memory and communication backend of the machine that a process runs on.

Outside `kernels/`, this is the only file that asks which kind of device it is.
"""

import contextlib
import ctypes
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Literal

import psutil
import torch

from grpo.errors import ConfigError
from grpo.runtime.env import env_count
from grpo.runtime.limits import available_memory, usable_cores

# Transparent huge pages (2 MB) for large tensors on Linux: the first access to a page of 4 KB costs one to two
# microseconds. torch reads the variable at its first CPU tensor, so it is set when this module is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

BFLOAT16_CAPABILITY = (8, 0)


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Compute with torch's own defaults within, whatever the calling program has set, and restore its settings after.

    A notebook may have set another default dtype or device, or have switched gradients or autocast.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    if device.type != "cpu":
        torch.set_default_device("cpu")
    kinds = dict.fromkeys(("cpu", device.type, "cuda" if torch.cuda.is_available() else "cpu"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in kinds:
            if kind != "meta" and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            if device.type != "cpu":
                torch.set_default_device(device)


def is_cpu(device: torch.device) -> bool:
    """Return whether tensors on `device` lie in the memory of the machine."""
    return device.type == "cpu"


def device_kind(device: torch.device) -> str:
    """Return the kind of `device` for messages: CPU, CUDA, MPS."""
    return device.type.upper()


def cpu_threads(processes_here: int) -> int:
    """Return the number of threads for each process: the cores of this machine divided among its processes.

    OMP_NUM_THREADS is the user's choice and is kept, except for the 1 that `accelerate launch` and torchrun set where
    nobody chose.
    """
    chosen = env_count("OMP_NUM_THREADS", 0)
    if chosen > 1 or (chosen == 1 and not _set_by_launcher("OMP_NUM_THREADS")):
        return chosen
    return max(1, usable_cores() // max(1, env_count("LOCAL_WORLD_SIZE", processes_here)))


def _set_by_launcher(name: str) -> bool:
    """Return whether the launcher of this process has set an environment variable that it was not given."""
    try:
        parent = psutil.Process(os.getppid())
        command = " ".join(parent.cmdline()[:6])
        launches = any(word in command for word in ("accelerate", "torchrun", "torch.distributed"))
        return launches and name not in parent.environ()
    except psutil.Error:
        return False


def set_threads(device: torch.device, processes: int) -> None:
    """Divide the cores among `processes` that compute on the CPU. Other devices keep torch's default."""
    if is_cpu(device):
        torch.set_num_threads(cpu_threads(processes))


def has_bfloat16(device: torch.device) -> bool:
    """Return whether layers may compute in bfloat16 on `device`: not where a GPU only emulates it."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
    return device.type == "cpu"


def has_fused_optimizer(device: torch.device) -> bool:
    """Return whether torch's optimizers have a fused implementation for `device` that this trainer uses."""
    return device.type in ("cpu", "cuda")


def check_gpus(processes_here: int, mixed_precision: str | None) -> None:
    """Check the GPUs of this machine against what the launch requested. Does nothing without a GPU.

    Raises:
        ConfigError: there are fewer GPUs than processes, or they have no bfloat16.
    """
    if not torch.cuda.is_available():
        return
    found = torch.cuda.device_count()
    if processes_here > found:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        limit = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise ConfigError(
            f"num_processes starts {processes_here} processes on this machine, which shows {found} GPUs{limit}: set "
            f"num_processes to {found} in the file of --config_file, or with accelerate launch --num_processes"
        )
    capability = torch.cuda.get_device_capability(0)
    if mixed_precision == "bf16" and torch.version.hip is None and capability < BFLOAT16_CAPABILITY:
        raise ConfigError(
            f"mixed_precision is bf16, which {torch.cuda.get_device_name(0)} (compute capability {capability[0]}."
            f"{capability[1]}) only emulates; 8.0 is needed: use --config_file accelerate_configs/single_gpu_fp16.yaml"
            f', or set mixed_precision to fp16 or "no"'
        )


def configure(device: torch.device) -> None:
    """Set the options of torch that this trainer needs on `device`, once per process.

    cuDNN's attention is switched off: it builds a plan for every new shape, and the shapes of decoding and training
    change at each call. So is TF32 in convolutions, torch's default: recurrent layers would round a prompt, but not the
    decoding step after it. TF32 in matrix products is up to the calling program (`matmul_note`).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cudnn.allow_tf32 = False


def matmul_note() -> str:
    """Return what the log says of the precision of float32 products. Empty unless the calling program lowered it."""
    precision = torch.get_float32_matmul_precision()
    return "" if precision == "highest" else f"; float32 products at precision {precision}, as this program has set it"


def attention_backends(device: torch.device) -> list[str]:
    """Return the backends that torch's own attention may choose from on `device`; none on a CPU, which has one."""
    if device.type != "cuda":
        return []
    backends = torch.backends.cuda
    allowed = {
        "flash": backends.flash_sdp_enabled,
        "memory-efficient": backends.mem_efficient_sdp_enabled,
        "cuDNN": backends.cudnn_sdp_enabled,
        "math": backends.math_sdp_enabled,
    }
    return [name for name, enabled in allowed.items() if enabled()]


def attention_off(device: torch.device) -> dict[str, str]:
    """Return the backends of torch's attention that `configure` switches off on `device`, and why."""
    return {"cuDNN": "it would plan every new shape"} if device.type == "cuda" else {}


def free_memory(device: torch.device, host_bytes: int = 0) -> int:
    """Return the bytes that can still be allocated on `device`.

    Args:
        device: The device.
        host_bytes: Bytes of the machine's memory that something else will take. They count, up to three quarters of
            what is free, where `device` uses that memory.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = available_memory()
    return max(free - host_bytes, free // 4)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held: on the GPU if `device` is one, else of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def empty_cache(device: torch.device) -> None:
    """Return memory that torch's allocator holds unused to `device`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def return_freed_memory(device: torch.device) -> None:
    """Return freed heap pages to the operating system at the end of a phase. Only glibc on Linux needs it.

    glibc keeps freed memory in pieces too small for the tensors of the next phase, so a CPU process would grow from
    step to step.
    """
    if is_cpu(device) and sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def device_names() -> list[str]:
    """Return the names of the GPUs that this process sees, or ["cpu"]."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or ["cpu"]


def describe_devices() -> list[str]:
    """Return name, compute capability and memory of the GPUs that this process sees, or ["cpu"]."""
    shown = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.1f} GiB"
        shown.append(f"{found.name} (compute capability {found.major}.{found.minor}, {memory})")
    return shown or ["cpu"]


def library_versions() -> dict[str, str]:
    """Return the versions of CUDA and its libraries that torch was built with. Empty without CUDA."""
    if torch.version.cuda is None:
        return {}
    found = {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    if torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def widest_float(device: torch.device) -> torch.dtype:
    """Return the most precise floating-point dtype of `device`: float32 on Apple GPUs, else float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def collective_backend(device: torch.device) -> Literal["nccl", "gloo"]:
    """Return the backend of collectives on tensors of `device`: nccl for NVIDIA GPUs, else gloo."""
    return "nccl" if device.type == "cuda" else "gloo"


def bind_thread(device: torch.device) -> None:
    """Make `device` the current one of this thread. torch keeps the current GPU per thread."""
    if device.type == "cuda" and device.index is not None:  # without an index, it is the default of every thread
        torch.cuda.set_device(device)


def synchronize(device: torch.device) -> None:
    """Wait until the work given to `device` is done. On the CPU, it is done at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class TimeMark:
    """A moment: on CUDA, the one at which the device has done the work given to it so far; else the present."""

    def __init__(self, device: torch.device | None) -> None:
        self._host = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device is not None and device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def seconds_since(self, earlier: "TimeMark") -> float:
        """Return the seconds between two marks. On CUDA, this waits for the device."""
        if self._event is None or earlier._event is None:
            return self._host - earlier._host
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


class SideStream:
    """A CUDA stream beside the default one, so that kernels of two threads can overlap. A no-op on other devices."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def wait_for_default(self) -> None:
        """Order the work of this stream after what the current stream has been given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Run on this stream within."""
        with torch.cuda.stream(self._stream):  # None: no change
            yield
