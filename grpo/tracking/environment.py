"""The environment record: versions, machine and commit of a run, to repeat its numbers."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from grpo.kernels.registry import report
from grpo.runtime.device import device_names
from grpo.runtime.redaction import redacted


def environment() -> dict[str, Any]:
    """Return versions, platform, devices, kernels, commit and command line. Never an environment variable."""
    versions: dict[str, str | None] = {}
    for library in ("grpo-trainer", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "peft"):
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "processor": processor_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": device_names(),
        "kernels": report("cpu" if device_names() == ["cpu"] else "cuda"),
        "git_commit": _git_commit(),
        "argv": [redacted(word) for word in sys.argv],
    }


def processor_name() -> str:
    """Return the name of the processor, or of its architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _git_commit() -> str | None:
    """Return the commit of the trainer's code, with "-dirty" if files were changed since; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
