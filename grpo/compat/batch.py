"""Batch arithmetic of TRL: sizes in completions per process and optimizer steps -> prompts and steps of this trainer.

per_device_train_batch_size 4, gradient_accumulation_steps 4, 2 processes, num_generations 8, num_iterations 2

optimizer step      4 * 4 * 2 = 32 completions            TRL counts optimizer steps
generation batch    32 completions = 4 prompts x 8        prompts_per_step 4
one step here       num_iterations 2 optimizer steps      max_steps 100 -> steps 50
"""

import math
from dataclasses import dataclass

from grpo.errors import ConfigError


def generation_batch(
    per_device: int, world_size: int, accumulation: int, num_generations: int, size: int | None, steps: int | None
) -> tuple[int, int]:
    """Return generation_batch_size and steps_per_generation, of which at most one is given.

    Args:
        per_device: Completions of one backward pass on each process.
        accumulation: Backward passes of one optimizer step.
        size: generation_batch_size: completions that are sampled at once, over all processes.
        steps: steps_per_generation: backward passes on each process that they are split into.

    Raises:
        ConfigError: The sizes do not divide, or the group is too small.
    """
    if num_generations < 2:
        raise ConfigError(
            f"num_generations is {num_generations}, needs to be at least 2: a lone completion has no other one to be "
            f"compared with"
        )
    share = per_device * world_size
    if size is not None and steps is not None and size != share * steps:
        raise ConfigError(
            f"generation_batch_size {size} and steps_per_generation {steps} are both set, and do not agree (per_device_"
            f"train_batch_size {per_device} x {world_size} processes x {steps} = {share * steps}): set one of them"
        )
    if size is not None and size % share:
        raise ConfigError(
            f"generation_batch_size is {size}, needs to be a multiple of per_device_train_batch_size {per_device} x "
            f"{world_size} processes = {share}"
        )
    steps = size // share if size is not None else steps or accumulation
    size = share * steps
    if size % num_generations:
        raise ConfigError(
            f"generation_batch_size is {size} (per_device_train_batch_size {per_device} x {world_size} processes x "
            f"steps_per_generation {steps}), needs to be a multiple of num_generations {num_generations}, so that each "
            f"prompt has all its completions"
        )
    return size, steps


@dataclass(frozen=True)
class Schedule:
    """TRL's batch sizes and lengths in this trainer's units."""

    prompts_per_step: int
    mini_batches: int
    """Optimizer steps that one pass over the completions of a step is split into."""
    num_iterations: int
    """Passes over them."""
    steps: int
    """Steps here."""
    max_steps: int
    """Optimizer steps that TRL would take."""
    updates_per_epoch: int | None
    """Optimizer steps of one pass over the data; None where its size is not known."""

    @property
    def updates(self) -> int:
        """Optimizer steps of one step here."""
        return self.mini_batches * self.num_iterations

    def steps_of(self, updates: float) -> int:
        """Return the number of steps here, at least 1, that take so many optimizer steps."""
        return max(1, math.ceil(updates / self.updates))


def schedule(
    *,
    generation_batch_size: int,
    steps_per_generation: int,
    gradient_accumulation_steps: int,
    num_generations: int,
    num_iterations: int,
    max_steps: int,
    num_train_epochs: float,
    rows: int | None,
) -> Schedule:
    """Return the schedule of a run.

    Args:
        rows: Rows of the training data; None for a stream, which needs max_steps.

    Raises:
        ConfigError: The batch cannot be split as it is asked for, or the length of the run is not known.
    """
    accumulation, prompts = gradient_accumulation_steps, generation_batch_size // num_generations
    if steps_per_generation % accumulation == 0:
        mini_batches, prompts_per_step = steps_per_generation // accumulation, prompts
    elif accumulation % steps_per_generation == 0 and num_iterations == 1:
        # Several generation batches in one optimizer step: the policy is the same for all of them.
        mini_batches, prompts_per_step = 1, prompts * (accumulation // steps_per_generation)
    else:
        raise ConfigError(
            f"steps_per_generation is {steps_per_generation} and gradient_accumulation_steps {accumulation}"
            f"{f' with num_iterations {num_iterations}' if num_iterations > 1 else ''}: an optimizer step would mix "
            f"completions of two policies. Make steps_per_generation a multiple of gradient_accumulation_steps"
        )
    per_epoch = None
    if rows is not None:
        passes = (rows // prompts) * num_iterations * steps_per_generation  # backward passes on each process
        per_epoch = max(1, math.ceil(passes / accumulation))
    if max_steps <= 0 and per_epoch is None:
        raise ConfigError(
            "max_steps is not set, but the length of train_dataset, a stream, is not known: set max_steps"
        )
    if max_steps <= 0:
        assert per_epoch is not None
        max_steps = math.ceil(num_train_epochs * per_epoch)
    steps = math.ceil(max_steps / (mini_batches * num_iterations))
    return Schedule(prompts_per_step, mini_batches, num_iterations, steps, max_steps, per_epoch)
