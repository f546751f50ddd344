"""Asynchronous sampling: the prompts of later steps are completed while the policy learns from earlier ones.

    max_staleness 0    sample 1, learn 1, sample 2, learn 2, ...           each step samples from the policy it trains
    max_staleness 1    sample 1 | learn 1 and sample 2 | learn 2 and sample 3 | ...     from the policy one step before

The weights that a step samples from are counted, never timed: those after step t - 1 - max_staleness for step t (the
initial ones for the first steps). So a run can be repeated, stopped and resumed to the bit, and nothing is older.
"""

import json
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any

from accelerate import Accelerator

from grpo.rollout.engine import RolloutEngine
from grpo.runtime.device import SideStream
from grpo.types import Completion, Group, Prompt, SamplingPlan


@dataclass(frozen=True)
class SampledBatch:
    """The result of one call of the engine."""

    groups: list[Group]
    seconds: float
    """Time spent sampling, whether the training loop waited for it or not."""
    version: int
    """Optimizer steps of the policy that it was sampled from."""


class AsyncSampler:
    """Samples the completions of this step and of the next `staleness` ones; those in a thread, if there are any.

    The weights that the engine reads may change only after `wait`.

    Args:
        engine: The rollout engine.
        plan: Number and length of the completions, temperature, seed.
        accelerator: Gives the autocast context of the run and the device.
        staleness: Number of steps that are sampled in advance.
        steps_left: Number of steps whose sampling has not begun.
        on_group: Called with each group as soon as it is complete, so that it can be scored early.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        plan: SamplingPlan,
        accelerator: Accelerator,
        *,
        staleness: int,
        steps_left: int,
        on_group: Callable[[Group], None] | None = None,
    ) -> None:
        self.engine, self.plan, self.accelerator = engine, plan, accelerator
        self.staleness, self.steps_left, self.on_group = staleness, steps_left, on_group
        self._pending: deque[Future[SampledBatch]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling") if staleness else None
        self._stream = SideStream(accelerator.device) if staleness else None

    def next_batch(self, draw_prompts: Callable[[], list[Prompt]], version: int) -> SampledBatch:
        """Return the completions of this step.

        Args:
            draw_prompts: Returns the prompts of the next step that is not being sampled yet, each time it is called.
            version: Optimizer steps that the weights have taken.
        """
        while not self._pending or (len(self._pending) <= self.staleness and self.steps_left > 0):
            self._start(draw_prompts(), version)
            self.steps_left -= 1
        return self._pending.popleft().result()

    def wait(self) -> None:
        """Wait until nothing is being sampled."""
        wait(self._pending)

    def give_up_memory(self) -> bool:
        """Let the engine free memory before each update, from now on. Return False if it can free nothing.

        It cannot while it samples for later steps.
        """
        return self.staleness == 0 and self.engine.give_up_memory()

    def close(self) -> None:
        """Cancel what has not begun."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return what was sampled and not trained on yet, as plain values: one row per group."""
        self.wait()
        return [
            {
                "place": place,
                "version": batch.version,
                "prompt": asdict(group.prompt) | {"columns": json.loads(json.dumps(group.prompt.columns, default=str))},
                "completions": [asdict(completion) for completion in group.completions],
            }
            for place, batch in enumerate(future.result() for future in self._pending)
            for group in batch.groups
        ]

    def load_state_dict(self, rows: list[dict[str, Any]]) -> None:
        """Restore this rank's share of every rank's `rows`, whatever the number of ranks was."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for place in sorted({row["place"] for row in rows}):
            step = sorted((row for row in rows if row["place"] == place), key=lambda row: row["prompt"]["draw"])
            future: Future[SampledBatch] = Future()
            future.set_result(SampledBatch([_group(row) for row in step[rank::world]], 0.0, step[0]["version"]))
            self._pending.append(future)
            self.steps_left -= 1

    def _start(self, prompts: list[Prompt], version: int) -> None:
        if self._thread is not None and self._stream is not None:
            self._stream.wait_for_default()  # the engine's weights have been copied on the default stream
            self._pending.append(self._thread.submit(self._sample, prompts, version))
            return
        future: Future[SampledBatch] = Future()
        future.set_result(self._sample(prompts, version))
        self._pending.append(future)

    def _sample(self, prompts: list[Prompt], version: int) -> SampledBatch:
        start = time.perf_counter()
        if self._stream is None:
            groups = self._generate(prompts)
        else:
            with self._stream.use():
                groups = self._generate(prompts)
        return SampledBatch(groups, time.perf_counter() - start, version)

    def _generate(self, prompts: list[Prompt]) -> list[Group]:
        with self.accelerator.autocast():
            return self.engine.generate(prompts, self.plan, finished=self.on_group)


def _group(row: dict[str, Any]) -> Group:
    prompt = row["prompt"] | {"token_ids": tuple(row["prompt"]["token_ids"])}
    return Group(Prompt(**prompt), [Completion(**completion) for completion in row["completions"]])
