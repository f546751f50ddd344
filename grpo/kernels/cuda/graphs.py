"""CUDA graphs: capture a decoding step once per shape, then replay it in one launch."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from grpo.kernels.registry import switch_off


class StepGraphs:
    """Captured steps by key. A step must only launch device work, and the same work for the same key."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def clear(self) -> None:
        """Drop all graphs. Required before the memory that they refer to is freed or replaced."""
        self._graphs.clear()

    def run(self, key: Hashable, step: Callable[[], None], state: Sequence[Tensor]) -> None:
        """Run one step: replay its graph, which is captured first if `key` is new.

        If the capture fails, kernel `cuda_graphs` is switched off and the step runs without a graph.

        Args:
            key: everything that the shapes of the step depend on.
            step: launches the work.
            state: tensors that a step changes. Capturing runs one extra step, so they are restored after it.
        """
        if key not in self._graphs:
            saved = [tensor.clone() for tensor in state]
            try:
                self._graphs[key] = _captured(step)
            except RuntimeError as error:
                switch_off("cuda_graphs", f"capture failed ({str(error).splitlines()[0]})")
            for tensor, before in zip(state, saved, strict=True):
                tensor.copy_(before)
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            step()


def _captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Return the graph of `step`, captured after one warm-up run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up outside the graph: libraries initialise
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may train meanwhile
        step()
    return graph
