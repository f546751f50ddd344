"""Resumption: the settings of a checkpoint and those of now -> what changed, and whether the run may go on with it.

free        changes nothing of what is learned, or takes effect from here on as one expects: said, and done
allowed     would make it another run: only with --allow_changes '[KEY, ...]'
forbidden   the checkpoint does not fit: a ConfigError
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from grpo.errors import ConfigError

Class = Literal["free", "needs a flag", "forbidden"]

FREE = (
    # Where it is written, how often, how it is watched, how fast it goes: the same is learned.
    *("run_dir", "resume", "allow_changes", "save_every", "save_total_limit", "rank_timeout", "tokens_per_batch"),
    *("eval_every", "data.eval_path", "data.eval_split", "data.eval_size", "data.cache", "data.card"),
    *("data.i_have_permission", "model.gradient_checkpointing", "model.reference_offload", "model.attn_implementation"),
    *("rollout.slots", "rollout.cache_gib", "rollout.engine", "scoring", "tracking", "callbacks"),
    *("rollout.vllm_mode", "rollout.vllm_server_base_url", "rollout.vllm_server_host", "rollout.vllm_server_port"),
    *("rollout.vllm_server_timeout", "rollout.vllm_group_port", "rollout.vllm_weight_transfer"),
    *("rollout.vllm_gpu_memory_utilization", "rollout.vllm_max_model_length", "rollout.max_logprob_difference"),
    # How far and how fast it goes on: applied from the next step.
    *("steps", "num_train_epochs", "optimizer"),
)
FORBIDDEN = (
    *("lora.r", "lora.target_modules", "model.torch_dtype", "model.load_in_4bit", "model.gguf_file"),
    *("model.sync_ref_model", "data.streaming", "curriculum.reward", "optimizer.optim"),
)
"""Everything else needs a flag: the model's name, data, rewards, sampling, objective, seed."""


@dataclass(frozen=True)
class Change:
    """One setting that is not what it was."""

    key: str
    before: Any
    now: Any
    kind: Class

    def __str__(self) -> str:
        return f"{self.key} {self.before} -> {self.now}"


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs between two flat configs, in the order of the config. A key that one of them lacks (another version of
    the trainer wrote it) is no change."""
    return [
        Change(key, before[key], value, class_of(key))
        for key, value in now.items()
        if key in before and before[key] != value
    ]


def class_of(key: str) -> Class:
    """optimizer.learning_rate -> free, seed -> needs a flag, lora.r -> forbidden."""
    if key in FORBIDDEN:
        return "forbidden"
    return "free" if key in FREE or key.partition(".")[0] in FREE else "needs a flag"


def check_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str], processes: tuple[int, int] = (1, 1)
) -> list[str]:
    """-> a line for each change that is made. Raises ConfigError for those that are forbidden or not allowed.

    `processes`: how many ranks wrote the checkpoint, how many go on. Which prompts a step draws does not depend on it.
    """
    changes = changed_settings(before, now)
    forbidden = [str(change) for change in changes if change.kind == "forbidden"]
    if forbidden:
        keys = ", ".join(change.key for change in changes if change.kind == "forbidden")
        raise ConfigError(
            f"resume: {'; '.join(forbidden)}: the checkpoint does not fit. Set {keys} back to resume with the lora.*, model.* "
            f"and data.* that the run was started with, or start a new run in another run_dir"
        )
    refused = [change for change in changes if change.kind == "needs a flag" and change.key not in allowed]
    if refused:
        keys = ", ".join(change.key for change in refused)
        raise ConfigError(
            f"resume: {'; '.join(map(str, refused))}: that would be another run. Set them back, or go on with "
            f"--allow_changes '[{keys}]'"
        )
    lines = [f"resume: {change} ({'from here on' if change.kind == 'free' else 'allowed'})" for change in changes]
    if processes[0] != processes[1]:
        lines.append(f"resume: {processes[0]} -> {processes[1]} processes (the same prompts in each step)")
    return [line for line in lines if not line.startswith(("resume: resume ", "resume: allow_changes "))]
