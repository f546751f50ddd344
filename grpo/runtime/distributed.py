"""Collectives: the only file through which ranks exchange values. Every rank must call each function.

With one process, all of them return what they were given.
"""

from collections.abc import Callable
from datetime import timedelta
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


class OutOfMemoryElsewhere(MemoryError):
    """Memory ran out on another rank, which has told this one."""

    def __init__(self) -> None:
        super().__init__("out of memory on another rank")


def error_of_any(accelerator: Accelerator, error: BaseException | None) -> BaseException | None:
    """Return `error`, or OutOfMemoryElsewhere if any other rank has one, or None on every rank."""
    if max_over_ranks(accelerator, error is not None):
        return error or OutOfMemoryElsewhere()
    return None


class Agreement:
    """Ranks tell each other whether memory has run out, between the collectives of a forward and backward pass.

    The flags are exchanged between CPUs, so that no rank waits for its device. A rank that fails announces it once, in
    place of the flag that the others exchange before their next collective.

    Args:
        seconds: Time to wait for the flag of another rank.
    """

    def __init__(self, seconds: float) -> None:
        self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=seconds))

    def check(self, error: BaseException | None = None) -> BaseException | None:
        """Exchange flags. Return `error`, or OutOfMemoryElsewhere if another rank has one, or None on every rank."""
        if isinstance(error, OutOfMemoryElsewhere):  # the exchange has taken place
            return error
        failed = torch.tensor(int(error is not None))
        torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return (error or OutOfMemoryElsewhere()) if failed else None

    def proceed(self) -> None:
        """Exchange flags before a collective.

        Raises:
            OutOfMemoryElsewhere: Another rank will not take part in it.
        """
        error = self.check()
        if error is not None:
            raise error


def timeout_of(accelerator: Accelerator) -> float:
    """Return the seconds that a rank waits for others in a collective."""
    handler = accelerator.init_handler
    return 1800.0 if handler is None or handler.timeout is None else handler.timeout.total_seconds()


class Neighbours:
    """Groups of `size` ranks in a row, which exchange objects among themselves. Collective.

    Args:
        accelerator: The Accelerator of the run.
        size: Ranks in a group, a divisor of the number of ranks.
    """

    def __init__(self, accelerator: Accelerator, size: int) -> None:
        self._size, self._group, self._place = size, None, accelerator.process_index % size
        if size > 1:
            ranks = range(accelerator.num_processes)
            groups = [list(ranks[first : first + size]) for first in ranks[::size]]
            timeout = timedelta(seconds=timeout_of(accelerator))
            self._group, _ = torch.distributed.new_subgroups_by_enumeration(groups, timeout, backend="gloo")

    def gather(self, values: list[T]) -> tuple[list[T], int]:
        """Return the values of all ranks of the group in rank order, and the place of this rank's first one."""
        if self._group is None:
            return values, 0
        parts: list[list[T]] = [[] for _ in range(self._size)]
        torch.distributed.all_gather_object(parts, values, group=self._group)
        return [value for part in parts for value in part], sum(map(len, parts[: self._place]))


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
