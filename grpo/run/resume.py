"""Resume: the settings of a checkpoint and the current ones -> the changes, and whether the run may continue with them.

free           does not affect the result, or takes effect from here on: logged, and applied
needs a flag   would make it another run: only with --allow_changes '[KEY, ...]'
forbidden      the checkpoint does not fit: a ConfigError

Each key declares its class in grpo/config/schema.py.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from grpo.config.schema import Config
from grpo.config.setting import Resume, keys_of
from grpo.errors import ConfigError


@dataclass(frozen=True)
class Change:
    """One setting that differs from the checkpoint's."""

    key: str
    before: Any
    now: Any
    kind: Resume

    def __str__(self) -> str:
        return f"{self.key} {self.before} -> {self.now}"


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Compare two flat configs, in the order of the config.

    A key that one of them lacks was written by another version of the trainer, and is no change.
    """
    return [
        Change(key, before[key], value, class_of(key))
        for key, value in now.items()
        if key in before and before[key] != value
    ]


def class_of(key: str) -> Resume:
    """Return the resume class of a key: optimizer.learning_rate -> free, seed -> needs a flag, lora.r -> forbidden."""
    keys = keys_of(Config)
    return keys[key].setting.resume if key in keys else "needs a flag"


def check_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str], processes: tuple[int, int] = (1, 1)
) -> list[str]:
    """Return a line for each change that is made.

    Args:
        before: the flat config in the checkpoint.
        now: the flat config of this run.
        allowed: keys in allow_changes.
        processes: number of ranks that wrote the checkpoint, and that continue. The drawn prompts do not depend on it.

    Raises:
        ConfigError: a change is forbidden or not allowed.
    """
    changes = changed_settings(before, now)
    forbidden = [str(change) for change in changes if change.kind == "forbidden"]
    if forbidden:
        keys = ", ".join(change.key for change in changes if change.kind == "forbidden")
        raise ConfigError(
            f"resume: {'; '.join(forbidden)}: the checkpoint does not fit. Set {keys} back to resume with the "
            f"lora.*, model.* and data.* that the run was started with, or start a new run in another run_dir"
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
