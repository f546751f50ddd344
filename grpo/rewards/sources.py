"""Source files of custom rewards and their sha256, recorded with the run."""

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path

from grpo.rewards.registry import RewardFunction

Sources = dict[str, dict[str, str]]
"""{"my_rewards.py:brevity": {"file": "/home/me/my_rewards.py", "sha256": "5c0f..."}}"""


def reward_sources(functions: Mapping[str, RewardFunction]) -> Sources:
    """Return the file of every reward that is not built in. One without a file (from a notebook) is left out."""
    sources: Sources = {}
    for name, function in functions.items():
        if (getattr(function, "__module__", None) or "").startswith("grpo."):
            continue
        try:
            path = Path(inspect.getfile(inspect.unwrap(function))).resolve()
            sources[name] = {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        except (OSError, TypeError):
            continue
    return sources


def changed_sources(before: Sources, now: Sources) -> list[str]:
    """Return a warning for each reward whose file has changed since the checkpoint was written."""
    return [
        f"reward '{name}' has changed since the checkpoint was written ({source['file']}, sha256 "
        f"{before[name]['sha256'][:12]} -> {source['sha256'][:12]}): further steps use the new version"
        for name, source in now.items()
        if name in before and before[name]["sha256"] != source["sha256"]
    ]
