"""AsyncSampler: the prompts of later steps -> completions, sampled while the policy still learns from earlier ones.

    max_staleness 0    sample 1, learn 1, sample 2, learn 2, ...           every completion is of the policy that learns from it
    max_staleness 1    sample 1 | learn 1 and sample 2 | learn 2 and sample 3 | ...            of the policy one step before

Which weights a step's completions are of is counted, never timed: those after step t - 1 - max_staleness for step t (the
first ones for the first steps). So a run can be repeated, and stopped and resumed, to the bit, and nothing is ever older.
"""

import json
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any

import torch

from grpo.types import Completion, Group, Prompt


@dataclass(frozen=True)
class Batch:
    """What one call of the engine made."""

    groups: list[Group]
    seconds: float
    """of sampling, whether anybody waited for it or not"""
    version: int
    """Steps done by the policy that it was sampled from."""


class AsyncSampler:
    """Calls `generate` for this step and for the next `staleness` ones; those in a thread, if there are any.

    The weights that `generate` reads may change only after `settle`.
    """

    def __init__(
        self, generate: Callable[[list[Prompt]], list[Group]], staleness: int, left: int, device: torch.device
    ) -> None:
        self.generate, self.staleness, self.device = generate, staleness, device
        self.left = left
        """Steps whose sampling has not begun."""
        self._begun: deque[Future[Batch]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling") if staleness else None
        self._stream: torch.cuda.Stream | None = None

    def take(self, draw: Callable[[], list[Prompt]], version: int) -> Batch:
        """The completions of this step. `draw` gives the next step's prompts each time it is called; `version` counts the
        steps that the weights have taken."""
        while not self._begun or (len(self._begun) <= self.staleness and self.left > 0):
            self._begin(draw(), version)
            self.left -= 1
        return self._begun.popleft().result()

    def settle(self) -> None:
        """Wait until nothing is being sampled."""
        wait(self._begun)

    def close(self) -> None:
        """What has not begun never will."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def rows(self) -> list[dict[str, Any]]:
        """What is sampled and not learned from yet, as plain values for a checkpoint: one row per group."""
        self.settle()
        return [
            {
                "place": place,
                "version": batch.version,
                "prompt": asdict(group.prompt) | {"columns": json.loads(json.dumps(group.prompt.columns, default=str))},
                "completions": [asdict(completion) for completion in group.completions],
            }
            for place, batch in enumerate(future.result() for future in self._begun)
            for group in batch.groups
        ]

    def load(self, rows: list[dict[str, Any]], rank: int, world: int) -> None:
        """Go on from every rank's `rows`: this rank takes its share of them, whatever the number of ranks was."""
        for place in sorted({row["place"] for row in rows}):
            step = sorted((row for row in rows if row["place"] == place), key=lambda row: row["prompt"]["draw"])
            future: Future[Batch] = Future()
            future.set_result(Batch([_group(row) for row in step[rank::world]], 0.0, step[0]["version"]))
            self._begun.append(future)
            self.left -= 1

    def _begin(self, prompts: list[Prompt], version: int) -> None:
        def work() -> Batch:
            start = time.perf_counter()
            groups = self.generate(prompts)
            return Batch(groups, time.perf_counter() - start, version)

        if self._thread is not None:
            self._begun.append(self._thread.submit(self._beside(work)))
            return
        future: Future[Batch] = Future()
        future.set_result(work())
        self._begun.append(future)

    def _beside(self, work: Callable[[], Batch]) -> Callable[[], Batch]:
        """On CUDA, sampling has a stream of its own: one stream would run its kernels and training's one after the other."""
        if self.device.type != "cuda":
            return work
        self._stream = self._stream or torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # the weights have been copied

        def on_stream() -> Batch:
            with torch.cuda.stream(self._stream):
                return work()

        return on_stream


def _group(row: dict[str, Any]) -> Group:
    prompt = row["prompt"] | {"token_ids": tuple(row["prompt"]["token_ids"])}
    return Group(Prompt(**prompt), [Completion(**completion) for completion in row["completions"]])
