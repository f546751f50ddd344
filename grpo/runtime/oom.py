"""Advice: out of memory -> four changes of this very config, with numbers, the cheapest first."""

import contextlib
import traceback
from collections.abc import Iterator

import torch

from grpo.config.schema import Config
from grpo.errors import OutOfMemory

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def memory_advice(config: Config) -> Iterator[None]:
    """Around a run: what no allocator could give becomes OutOfMemory, which says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        phase = phase_of(error)
        edits = "\n".join(f"  {index}. {edit}" for index, edit in enumerate(memory_edits(config, phase), start=1))
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutOfMemory(
            f"out of memory while {phase}: {said[:300]}\nChange one of these, in this order, and start again "
            f"(--resume auto goes on from the last checkpoint):\n{edits}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is an allocator, of CUDA, of the CPU or of Python, that has failed."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def phase_of(error: BaseException) -> str:
    """loading, sampling, evaluating or learning: from where it was raised."""
    frames = [(frame.filename.replace("\\", "/"), frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    for phase, part, function in (
        ("evaluating", "grpo/trainer.py", "held_out"),
        ("learning", "grpo/trainer.py", "update"),
        ("sampling", "grpo/trainer.py", "loop"),
    ):
        if any(part in filename and name == function for filename, name in frames):
            return phase
    return "loading"


def memory_edits(config: Config, phase: str) -> list[str]:
    """The four that help most in this phase and are not made yet, as flags; first those that leave the result as it is."""
    sampling = config.sampling
    longest = (config.data.max_prompt_length or 0) + sampling.max_completion_length
    tokens = max(longest, config.tokens_per_batch // 2)
    slots = max(1, config.rollout.slots // 2)
    shorter = max(1, sampling.max_completion_length * 3 // 4)
    possible: dict[str, str | None] = {
        "tokens": f"--tokens_per_batch {tokens} (now {config.tokens_per_batch}): fewer tokens in the model at once; "
        "the gradient stays the same"
        if tokens < config.tokens_per_batch
        else None,
        "checkpointing": None
        if config.model.gradient_checkpointing
        else "--model.gradient_checkpointing true (now false): one layer's activations instead of all, for about a third "
        "more compute; the gradient stays the same",
        "slots": f"--rollout.slots {slots} (now {config.rollout.slots}): fewer completions decoded at once; the same "
        "completions"
        if slots < config.rollout.slots
        else None,
        "lora": None
        if config.lora.r is not None
        else "--lora.r 16 (now off): gradients and AdamW's moments, 12 bytes for each weight, for an adapter only; no "
        "second model as the reference",
        "offload": "--model.reference_offload true (now false): the reference, 4 bytes for each weight, is on the GPU only "
        "while it is used"
        if config.objective.beta > 0 and config.lora.r is None and not config.model.reference_offload
        else None,
        "completion": f"--sampling.max_completion_length {shorter} (now {sampling.max_completion_length}): a quarter less "
        "for the longest completions; those that need more are cut off",
        "prompts": f"--prompts_per_step {max(1, config.prompts_per_step // 2)} (now {config.prompts_per_step}): half the "
        "completions in a step, and a noisier gradient",
        "model": "a smaller model.name, or accelerate_configs/fsdp2.yaml, which shares weights and moments out over 2 GPUs "
        "or more",
    }
    order = {
        "loading": ("lora", "offload", "model", "checkpointing", "tokens", "slots"),
        "sampling": ("slots", "lora", "offload", "completion", "prompts", "model"),
        "evaluating": ("slots", "lora", "offload", "completion", "prompts", "model"),
        "learning": ("tokens", "checkpointing", "lora", "offload", "completion", "model"),
    }[phase]
    known = [possible[name] for name in (*order, "completion", "prompts", "model")]
    return list(dict.fromkeys(edit for edit in known if edit is not None))[:4]
