"""Sources: which file each reward of one's own came from, and its sha256, so that a run says what it was judged by."""

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path

from grpo.rewards.registry import RewardFunction

Sources = dict[str, dict[str, str]]
"""{"my_rewards.py:brevity": {"file": "/home/me/my_rewards.py", "sha256": "5c0f..."}}"""


def reward_sources(functions: Mapping[str, RewardFunction]) -> Sources:
    """The file of every reward that is not built in. One that has no file (typed into a notebook) is left out."""
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
    """A warning for each reward whose file is not what it was when the checkpoint was written."""
    return [
        f"warning: reward '{name}' was changed since the checkpoint was written ({source['file']}, sha256 "
        f"{before[name]['sha256'][:12]} -> {source['sha256'][:12]}): what follows is judged by other rules"
        for name, source in now.items()
        if name in before and before[name]["sha256"] != source["sha256"]
    ]
