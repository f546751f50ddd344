"""Registry: one small class behind rewards, datasets, objectives and engines.

register_reward = REWARDS.register          # @register_reward("brevity") above a function adds it
REWARDS.get("brevity")                      # by name
REWARDS.get("my_package.scores:brevity")    # or by import path
REWARDS.get("my_rewards.py:brevity")        # or by file
"""

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from grpo.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names -> entries of one kind ("reward", "dataset", "objective", "engine").

    Args:
        kind: Noun for error messages.
        package: Package with the built-in entries. Its modules are imported when a name is looked up that is not
            registered yet: the module of that name first, then the others. A new file there needs no other change.
    """

    def __init__(self, kind: str, package: str | None = None):
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the function or class below it under `name`. A name can be taken once."""

        def file_under_name(entry: T) -> T:
            taken = self._entries.get(name)
            if taken is not None and _origin(taken) != _origin(entry):
                raise ValueError(
                    f"{self.kind} '{name}' is registered already, by {_origin(taken)}: choose another name"
                )
            self._entries[name] = entry
            return entry

        return file_under_name

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self._import_until(None)
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """The entry called `name`, or the one that `module:attribute` or `path/file.py:attribute` points to.

        Raises ConfigError for a name that is not there, with the nearest one that is.
        """
        if ":" not in name:
            self._import_until(name)
        if name in self._entries:
            return self._entries[name]
        if ":" in name:
            return self._load(name)
        near = difflib.get_close_matches(name, self._entries, n=3)
        near.sort(
            key=lambda known: sorted(known) != sorted(name)
        )  # letters uses_packed_attention: "gpro" is grpo, not gspo
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(
            f"unknown {self.kind} '{name}': {hint}Known: {', '.join(self.names())}; or point to your own with "
            f"'package.module:name' or 'path/file.py:name'"
        )

    def _import_until(self, name: str | None) -> None:
        """Import the package's modules, the one called `name` first, until `name` is registered; all for None."""
        if self._package is None:
            return
        modules = [found.name for found in pkgutil.iter_modules(importlib.import_module(self._package).__path__)]
        for module in sorted(modules, key=lambda module: module != name):
            if name in self._entries:
                return
            importlib.import_module(f"{self._package}.{module}")

    def _load(self, name: str) -> T:
        place, _, attribute = name.rpartition(":")
        if place.endswith(".py"):
            path = Path(place).resolve()
            if not path.is_file():
                raise ConfigError(f"{self.kind} '{name}': there is no file {path}")
            # One module per file, however many entries are taken from it, so that its own @register_... runs once.
            module_name = "grpo_file_" + hashlib.sha256(str(path).encode()).hexdigest()[:12]
            module = sys.modules.get(module_name)
            if module is None:
                spec = importlib.util.spec_from_file_location(module_name, path)
                assert spec is not None and spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                sys.modules[module_name] = module
                try:
                    spec.loader.exec_module(module)
                except Exception as error:
                    del sys.modules[module_name]
                    raise ConfigError(f"{self.kind} '{name}': {path} cannot be imported: {error!r}") from error
        else:
            try:
                module = importlib.import_module(place)
            except ImportError as error:
                raise ConfigError(f"{self.kind} '{name}': module '{place}' cannot be imported: {error}") from error
        if not hasattr(module, attribute):
            raise ConfigError(f"{self.kind} '{name}': {place} has no '{attribute}'")
        return getattr(module, attribute)


def _origin(entry: object) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', repr(entry))}"
