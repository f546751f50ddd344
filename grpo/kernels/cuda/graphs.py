"""CUDA graphs: a decoding step is captured once for each shape and then replayed in one launch."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from grpo.kernels.registry import switch_off


class StepGraphs:
    """Captured steps by key. A step must do device work alone, and the same for the same key."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def clear(self) -> None:
        """Drop all graphs: the memory that they point at is about to change."""
        self._graphs.clear()

    def run(self, key: Hashable, step: Callable[[], None], state: Sequence[Tensor]) -> None:
        """Take one step: replayed, or captured first where `key` is new.

        Args:
            key: what the shapes of the step depend on.
            step: the work.
            state: tensors that a step changes. Capturing takes a step that does not count, so they are put back.
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
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a first run outside the graph: libraries set themselves up
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # training may go on meanwhile
        step()
    return graph
