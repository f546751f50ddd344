"""Out of memory: the error of an allocator -> OutOfMemory with the changes of this config that help most."""

import contextlib
from collections.abc import Iterator

from grpo.config.schema import Config
from grpo.errors import OutOfMemory, is_out_of_memory

MAX_SUGGESTIONS = 4
FEW_TOKENS = 2048
"""Tokens of a batch below which its launches take longer than the work that they give to a GPU."""


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark an error raised within as one of this phase (sampling, learning, evaluating); the innermost mark counts."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "phase"):
            error.phase = name  # type: ignore[attr-defined]
        raise


@contextlib.contextmanager
def memory_advice(config: Config) -> Iterator[None]:
    """Turn an out-of-memory error of any allocator into OutOfMemory, which says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        where = getattr(error, "phase", "loading")
        edits = "\n".join(f"  {index}. {edit}" for index, edit in enumerate(memory_edits(config, where), start=1))
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutOfMemory(
            f"out of memory while {where}: {message[:300]}\nChange one of these, in this order, and start again "
            f"(--resume auto goes on from the last checkpoint):\n{edits}"
        ) from error


def memory_edits(config: Config, phase: str) -> list[str]:
    """Return the changes that help most in this phase, as flags; those that keep the result come first."""
    sampling = config.sampling
    longest = (config.data.max_prompt_length or 0) + sampling.max_completion_length
    tokens = max(longest, config.tokens_per_batch // 2)
    slots = max(1, config.rollout.slots // 2)
    shorter = max(1, sampling.max_completion_length * 3 // 4)
    possible: dict[str, str | None] = {
        "tokens": f"--tokens_per_batch {tokens} (now {config.tokens_per_batch}): fewer tokens per forward pass; "
        "the gradient stays the same"
        if tokens < config.tokens_per_batch
        else None,
        "checkpointing": None
        if config.model.gradient_checkpointing
        else "--model.gradient_checkpointing true (now false): stores one layer's activations instead of all, for "
        "about a third more compute; the gradient stays the same",
        "slots": f"--rollout.slots {slots} (now {config.rollout.slots}): fewer completions decoded at once; the same "
        "completions"
        if slots < config.rollout.slots
        else None,
        "lora": None
        if config.lora.r is not None
        else "--lora.r 16 (now off): gradients and AdamW moments (12 bytes per weight) for an adapter only, and no "
        "second model as the reference",
        "offload": "--model.reference_offload true (now false): the reference (4 bytes per weight) is on the GPU only "
        "while it is used"
        if config.objective.beta > 0 and config.lora.r is None and not config.model.reference_offload
        else None,
        "completion": f"--sampling.max_completion_length {shorter} (now {sampling.max_completion_length}): a quarter "
        "less for the longest completions; longer ones are cut off",
        "prompts": f"--prompts_per_step {max(1, config.prompts_per_step // 2)} (now {config.prompts_per_step}): half "
        "the completions per step, and a noisier gradient",
        "model": "a smaller model.name, or accelerate_configs/fsdp2.yaml, which shards weights and moments over 2 or "
        "more GPUs",
    }
    order = {
        "loading": ("lora", "offload", "model", "checkpointing", "tokens", "slots"),
        "sampling": ("slots", "lora", "offload", "completion", "prompts", "model"),
        "evaluating": ("slots", "lora", "offload", "completion", "prompts", "model"),
        "learning": ("tokens", "checkpointing", "lora", "offload", "completion", "model"),
    }[phase]
    known = [possible[name] for name in (*order, "completion", "prompts", "model")]
    return list(dict.fromkeys(edit for edit in known if edit is not None))[:MAX_SUGGESTIONS]
