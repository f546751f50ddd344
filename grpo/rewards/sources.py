"""Source files of custom rewards and their sha256, recorded with the run."""

import contextlib
import hashlib
import inspect
import sys
from collections.abc import Iterable, Mapping
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


def source_hashes(functions: Iterable[RewardFunction]) -> dict[str, str]:
    """Return the sha256 of each file that functions depend on: their own, and imported ones of the user's folders.

    These are the folders of the functions and the working directory, without installed packages.
    """
    own = {Path(source["file"]) for source in reward_sources({str(n): f for n, f in enumerate(functions)}).values()}
    if not own:
        return {}
    roots = {*(path.parent for path in own), Path.cwd()}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if (
            isinstance(file, str)
            and file.endswith(".py")
            and not name.startswith("grpo.")
            and "site-packages" not in file
        ):
            path = Path(file)
            if any(root in path.parents for root in roots):
                own.add(path)
    hashes = {}
    for path in own:
        with contextlib.suppress(OSError):
            hashes[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def changed_sources(before: Sources, now: Sources) -> list[str]:
    """Return one line for each reward whose file has changed since the checkpoint was written."""
    return [
        f"reward '{name}' has changed since the checkpoint was written ({source['file']}, sha256 "
        f"{before[name]['sha256'][:12]} -> {source['sha256'][:12]})"
        for name, source in now.items()
        if name in before and before[name]["sha256"] != source["sha256"]
    ]
