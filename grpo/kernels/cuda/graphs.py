"""CUDA graphs: capture a decoding step once per shape, then replay it in one launch.

All graphs share one stream and one memory pool: they run one after another, so that each may reuse the memory of the
others' temporaries. What a step leaves behind is in tensors outside the pool.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo.errors import is_fatal, is_out_of_memory
from grpo.kernels.registry import switch_off


class StepGraphs:
    """Captured steps by key. A step must only launch device work, and the same work for the same key."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def clear(self) -> None:
        """Drop all graphs. Required before the memory that they refer to is freed or replaced."""
        self._graphs.clear()
        self._pool = None

    def run(
        self, key: Hashable, step: Callable[[], None], state: Sequence[Tensor], results: Sequence[Tensor] = ()
    ) -> bool:
        """Run one step: replay its graph, which is captured first if `key` is new.

        The first replay is compared with the step run without a graph. If they differ, or if the capture fails, kernel
        `cuda_graphs` is switched off, all graphs are dropped, and this and all later steps run without one.

        Args:
            key: everything that the shapes of the step depend on.
            step: launches the work.
            state: tensors that a step reads and changes. They are restored between its runs.
            results: further tensors that a step writes, and that are compared.

        Returns:
            False if graphs are off from now on.

        Raises:
            RuntimeError: the device itself has failed, or has no memory for a step without graphs.
        """
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return True
        before, current = [tensor.clone() for tensor in state], torch.cuda.current_stream()
        try:
            reason = self._capture(key, step, state, before, results)
        except RuntimeError as error:
            if is_fatal(error):
                raise
            what = "no memory for a graph" if is_out_of_memory(error) else "the capture of a graph failed"
            reason = f"{what} ({str(error).strip().splitlines()[0][:200]})"
        if reason is None:
            return True
        torch.cuda.set_stream(current)  # a failed capture leaves its own stream behind
        self.clear()
        switch_off("cuda_graphs", reason)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        step()
        return False

    def _capture(
        self,
        key: Hashable,
        step: Callable[[], None],
        state: Sequence[Tensor],
        before: list[Tensor],
        results: Sequence[Tensor],
    ) -> str | None:
        """Run a step, capture it, and compare the first replay with the run. Return None, or why they differ."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # libraries initialise, which a capture forbids
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        expected = [tensor.clone() for tensor in (*state, *results)]
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may train meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        graph.replay()
        if not are_equal((*state, *results), expected):
            return "the first replay of a graph differs from the step without it"
        self._graphs[key] = graph
        return None


def are_equal(ours: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether tensors are equal in pairs: integers to the bit, other numbers to rounding."""
    same = [
        torch.isclose(mine, other, rtol=1e-2, atol=1e-2, equal_nan=True).all()
        if mine.dtype.is_floating_point
        else (mine == other).all()
        for mine, other in zip(ours, others, strict=True)
    ]
    return bool(torch.stack(same).all())
