"""Source files of custom rewards and their sha256, recorded with the run."""

import ast
import contextlib
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Sources = dict[str, dict[str, Any]]
"""{"my_rewards.py:brevity": {"file": "/home/me/my_rewards.py", "sha256": "5c0f...", "imports": {FILE: SHA256, ...}}}

The imports are those of the user's folders; the key is left out where there are none. Tools and environments have a
"key", too: the config key that names them."""


def reward_sources(functions: Mapping[str, Callable[..., Any]]) -> Sources:
    """Return the file of every function or class that is not built in. One without a file (from a notebook) is left
    out."""
    sources: Sources = {}
    for name, function in functions.items():
        if (getattr(function, "__module__", None) or "").startswith("grpo."):
            continue
        try:
            path = Path(inspect.getfile(inspect.unwrap(function))).resolve()
            sources[name] = {"file": str(path), "sha256": _sha256(path)}
            imports = {str(file): _sha256(file) for file in sorted(_imported_files(path, function.__module__))}
            if imports:
                sources[name]["imports"] = imports
        except (OSError, TypeError):
            continue
    return sources


def source_hashes(functions: Iterable[Callable[..., Any]]) -> dict[str, str]:
    """Return the sha256 of each file that functions depend on: their own, and imported ones of the user's folders.

    These are the folders of the functions and the working directory, without installed packages.
    """
    own = {Path(source["file"]) for source in reward_sources({str(n): f for n, f in enumerate(functions)}).values()}
    if not own:
        return {}
    roots = {*(path.parent for path in own), Path.cwd()}
    own |= {path for name in list(sys.modules) if (path := _users_file(name, roots)) is not None}
    hashes = {}
    for path in own:
        with contextlib.suppress(OSError):
            hashes[str(path)] = _sha256(path)
    return hashes


def source_label(name: str, source: Mapping[str, Any]) -> str:
    """Return what a source is called in messages: "reward 'my_rewards.py:brevity'"."""
    return f"{source.get('key', 'rewards').removesuffix('s')} '{name}'"


def changed_sources(before: Sources, now: Sources) -> dict[str, list[str]]:
    """Return one line for each file, or module that it imports, that differs from the checkpoint's, by config key."""
    lines: dict[str, list[str]] = {}
    for name, source in now.items():
        for file, old, new in _pairs(before[name], source) if name in before else ():
            if old != new:
                lines.setdefault(source.get("key", "rewards"), []).append(
                    f"{source_label(name, source)} has changed since the checkpoint was written ({file}, sha256 "
                    f"{old[:12]} -> {new[:12]})"
                )
    return lines


def _pairs(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Iterate over (file, sha256 before, sha256 now) of the files that both name."""
    yield now["file"], before["sha256"], now["sha256"]
    imports = before.get("imports", {})
    for file, sha256 in now.get("imports", {}).items():
        if file in imports:
            yield file, imports[file], sha256


def _imported_files(path: Path, module: str) -> set[Path]:
    """Return the user's files that `path` (the file of `module`) imports, directly or through others."""
    roots, found = {path.parent, Path.cwd()}, {path: module}
    todo = [path]
    while todo:
        file = todo.pop()
        for name in _imported_names(file, found[file]):
            other = _users_file(name, roots)
            if other is not None and other not in found:
                found[other] = name
                todo.append(other)
    return set(found) - {path}


def _imported_names(path: Path, module: str) -> Iterator[str]:
    """Iterate over the names that the import statements of a file may load as modules."""
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    parts = alias.name.split(".")
                    yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))
            elif isinstance(node, ast.ImportFrom):
                package = module.split(".")[: -node.level] if node.level else []
                base = ".".join([*package, *filter(None, [node.module])])
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)


def _users_file(name: str, roots: set[Path]) -> Path | None:
    """Return the file of a loaded module below `roots`; None for installed packages and for this library."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if not isinstance(file, str) or not file.endswith(".py") or name.startswith("grpo.") or "site-packages" in file:
        return None
    path = Path(file).resolve()
    return path if any(root.resolve() in path.parents for root in roots) else None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
