"""Compilation of this package's C files, on this machine, at first use.

    functions = library()          # a few seconds once per machine, then loaded from ~/.cache/grpo or GRPO_CACHE
    if functions is not None: functions.norm(threads, rows, ...)

Every C function has a counterpart in PyTorch, which is used without a compiler and which the tests compare with. The
variable CC names the compiler. CC=none uses PyTorch only.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from grpo.kernels.registry import is_on
from grpo.runtime.storage import cache_folders

FLAGS = ["-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-ffp-contract=fast"]
# Allow vector code for sums. NaN and infinity are preserved.
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
SOURCE = Path(__file__).with_name("kernels.c")
SECONDS = 60
"""Time limit of each call of the compiler."""
_CHECKSUM_BYTES = 32


def is_readable(*tensors: Tensor, dtype: torch.dtype = torch.float32, contiguous: bool = True) -> bool:
    """Return whether C can read all tensors: plain CPU tensors of `dtype`, contiguous unless that is not required."""
    return all(
        type(tensor) in (Tensor, nn.Parameter, FakeTensor)  # no shards; fake tensors represent real ones
        and tensor.is_cpu
        and tensor.dtype == dtype
        and (tensor.is_contiguous() or not contiguous)
        for tensor in tensors
    )


def threads_for(numbers: int) -> int:
    """Return the number of threads for an operation on so many numbers: one if starting threads would cost more."""
    return torch.get_num_threads() if numbers > 32768 else 1


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a contiguous tensor, which the caller must keep alive. None stays None."""
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def compiled(source: Path, **functions: str) -> ctypes.CDLL | None:
    """Compile `source`, or load it from the cache, and return its functions.

    Args:
        source: a C file of this package.
        **functions: name -> types of the arguments, one letter each: i int, l long, f float, p pointer.

    Returns:
        The library. None without a compiler or an OpenMP runtime, or if compilation fails.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    runtime = _openmp_of_torch()
    if runtime is None or shutil.which(compiler[0]) is None:
        return None
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=SECONDS, check=True).stdout
        texts = b"".join(file.read_bytes() for file in (source, *sorted(Path(__file__).parent.glob("*.[ch]"))))
        key = hashlib.sha256(texts + version + " ".join([*compiler, *FLAGS, _processor()]).encode()).hexdigest()
        library = _find_or_compile(compiler, source, f"{source.stem}-{key[:16]}.so")
        if library is None:
            return None
        # The threads of torch: a second pool would compete for the cores.
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError):
        return None
    kinds = {"i": ctypes.c_int, "l": ctypes.c_long, "f": ctypes.c_float, "p": ctypes.c_void_p}
    for name, arguments in functions.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = [kinds[kind] for kind in arguments], None
    return loaded


def library() -> Any:
    """Return the functions of kernels.c, which includes fused_ops.c and attention.c. None if it cannot be compiled."""
    return compiled(
        SOURCE,
        norm="ilifpppp",
        norm_backward="ilippppppp",
        norm_bf16="ilifpppp",
        norm_backward_bf16="ilippppppp",
        swiglu_rows="ilipp",
        swiglu_rows_bf16="ilipp",
        swiglu_rows_backward="ilippp",
        swiglu_rows_backward_bf16="ilippp",
        split_heads="iliiipppppp",
        split_heads_bf16="iliiipppppp",
        join_heads="iliiipppppp",
        join_heads_bf16="iliiipppppp",
        swiglu="ilppp",
        swiglu_backward="ilppppp",
        rotate="iliiipppp",
        draw="ilifppppp",
        attention_forward="iiiiiiiifippppppppp",
        attention_backward="iiiiiiiifipppppppppppppp",
    )


def c_kernel(name: str, *tensors: Tensor) -> bool:
    """Return whether the C kernel `name` is switched on, was compiled, and can read `tensors`."""
    return is_readable(*tensors) and is_on(name) and library() is not None


def _find_or_compile(compiler: list[str], source: Path, name: str) -> Path | None:
    """Return the library in the first folder of the cache that has a good one or can take it.

    Raises:
        SubprocessError: The compiler refuses the source.
    """
    for folder in cache_folders():
        try:
            if not _is_whole(folder / name):
                _compile(compiler, source, folder / name)
            if _ours(folder / name):
                return folder / name
        except OSError:  # a full disk, or a file of another user
            continue
    return None


def _ours(library: Path) -> bool:
    """Return whether only this user or root can have written the library: its code runs as this user."""
    written = library.stat()
    return written.st_uid in (0, os.getuid()) and not written.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_whole(library: Path) -> bool:
    """Return whether the file ends with the checksum of what comes before: a page that is missing ends the process."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return content[-_CHECKSUM_BYTES:] == hashlib.sha256(content[:-_CHECKSUM_BYTES]).digest()


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    """Compile `source` into `library`, in a temporary folder and then by an atomic rename."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made, linked = Path(folder) / "made.o", Path(folder) / "linked.so"
        for command in (
            [*compiler, *FLAGS, "-c", str(source), "-o", str(made)],
            # No -fopenmp, which would link a second OpenMP runtime. -Bsymbolic prefers its own functions to others of
            # the same name.
            [*compiler, "-shared", "-Wl,-Bsymbolic", str(made), "-o", str(linked), "-lm"],
        ):
            subprocess.run(command, capture_output=True, timeout=SECONDS, check=True)
        content = linked.read_bytes()
        linked.write_bytes(content + hashlib.sha256(content).digest())  # the loader ignores what follows the library
        linked.chmod(0o755)
        linked.replace(library)  # atomic: another process may compile it at the same time


def _openmp_of_torch() -> str | None:
    """Return the path of the OpenMP runtime that this process has loaded. None if none is found."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    files = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    found = [file for file in sorted(files) if Path(file).name.startswith(("libgomp", "libiomp", "libomp"))]
    # Other packages may have loaded a runtime of their own.
    return min(found, key=lambda file: "torch" not in Path(file).parts, default=None)


def _processor() -> str:
    """Return the processor's name and features, which -march=native depends on: machines may share a home folder."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("model name", "flags", "CPU part", "Features")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))
