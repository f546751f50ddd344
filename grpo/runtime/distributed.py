"""Collectives: the only file through which ranks exchange values. Every rank must call each function.

With one process, all of them return what they were given.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from grpo.errors import GrpoError
from grpo.runtime.device import widest_float
from grpo.runtime.sums import Sums

T = TypeVar("T")


def run_on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Call `work` on the main process and return its result, pickled, on every rank.

    Raises:
        GrpoError: On every rank, if `work` raised it on the main process. No rank waits for one that has failed.
    """
    result: T | GrpoError | None = None
    if accelerator.is_main_process:
        try:
            result = work()
        except GrpoError as error:
            result = error
    [result] = broadcast_object_list([result])
    if isinstance(result, GrpoError):
        raise result
    return result


def sum_over_ranks(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Return the element-wise sums of `values` over all ranks, in float64 where the device has it."""
    if accelerator.num_processes == 1:
        return values
    total = torch.tensor(values, dtype=widest_float(accelerator.device), device=accelerator.device)
    torch.distributed.all_reduce(total)
    return total.tolist()


def max_over_ranks(accelerator: Accelerator, value: int) -> int:
    """Return the largest `value` of all ranks."""
    if accelerator.num_processes == 1:
        return value
    largest = torch.tensor(value, device=accelerator.device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def merge_sums(accelerator: Accelerator, sums: Sums) -> None:
    """Add up the sums of every rank in place, in one collective. Every rank must hold the same names."""
    names = sums.names()
    flat = sum_over_ranks(accelerator, sums.tensor(names).flatten().tolist())
    sums.load(names, torch.tensor(flat, dtype=torch.float64).reshape(-1, 2))


def gather_rows(accelerator: Accelerator, rows: list[dict]) -> list[dict]:
    """Return the rows of all ranks, in rank order."""
    if accelerator.num_processes == 1:
        return rows
    parts: list[list[dict]] = [[] for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
