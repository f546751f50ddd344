"""Launch: how many processes were requested, and which of them run on this machine."""

import contextlib
import os
import socket
from pathlib import Path

import psutil
import yaml
from accelerate import Accelerator

from grpo.runtime.distributed import gather_rows
from grpo.runtime.env import env_count
from grpo.runtime.exit import on_peer_timeout

_local_peers: list[psutil.Process] = []
"""The other ranks that the same launcher started on this machine."""


def requested_processes() -> int:
    """Return the number of processes that the launch requested: WORLD_SIZE, or the command line of the launcher."""
    if started := env_count("WORLD_SIZE", 0):
        return started
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return 1
    if not any("accelerate" in Path(word).name for word in words[:4]):
        return 1
    requested = 1
    for word, value in zip(words, [*words[1:], ""], strict=True):
        key, _, inline = word.partition("=")
        value = inline or value
        if key in ("--num_processes", "--num-processes") and value.isdigit():
            return int(value)
        if key in ("--config_file", "--config-file") and Path(value).is_file():
            requested = int((yaml.safe_load(Path(value).read_text()) or {}).get("num_processes", 1))
        if word.endswith(".py"):
            break  # the rest are arguments of the script
    return requested


def find_local_peers(accelerator: Accelerator) -> None:
    """Record the other ranks on this machine for `end_local_peers`. Collective."""
    _local_peers.clear()
    if accelerator.num_processes == 1:
        return
    mine = {"host": socket.gethostname(), "pid": os.getpid()}
    for row in gather_rows(accelerator, [mine]):
        with contextlib.suppress(psutil.Error):
            if row["host"] == mine["host"] and row["pid"] != mine["pid"]:
                process = psutil.Process(row["pid"])
                if process.ppid() == os.getppid():  # not an unrelated process with that number in another container
                    _local_peers.append(process)


@on_peer_timeout
def end_local_peers() -> None:
    """Kill the other ranks on this machine after a collective has timed out.

    A rank that hangs ignores SIGTERM, and the launcher would wait another 30 s before it kills it.
    """
    for process in _local_peers:
        with contextlib.suppress(psutil.Error):
            process.kill()
