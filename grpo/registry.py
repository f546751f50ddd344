"""Registry: names -> components of one kind (rewards, datasets, losses, advantage estimators, engines, trackers, ...).

register_reward = REWARDS.register          # @register_reward("brevity") above a function adds it
REWARDS.get("brevity")                      # by name
REWARDS.get("my_package.scores:brevity")    # by import path
REWARDS.get("my_rewards.py:brevity")        # by file
"""

import contextlib
import difflib
import fnmatch
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from grpo.errors import ConfigError

T = TypeVar("T")
Check = Callable[[Any], None]
"""config -> None. Raises ConfigError for settings that a component cannot work with."""


class Registry(Generic[T]):
    """Names -> entries of one kind.

    Args:
        kind: what an entry is called in messages ("reward", "loss", "engine").
        package: the package with the built-in entries. Its modules are imported when a name is looked up that is not
            registered yet: the module of that name first, then the others. A new file there needs no other change.
        key: the config key that names an entry, for messages.
        modules: a glob pattern for the names of these modules inside `package`.
    """

    def __init__(self, kind: str, package: str | None = None, *, key: str = "", modules: str = "*"):
        self.kind, self.key = kind, key
        self._package, self._modules = package, modules
        self._entries: dict[str, T] = {}
        self._sources: dict[str, Any] = {}
        self._checks: dict[str, Check] = {}

    def register(self, name: str, *, check: Check | None = None) -> Callable[[T], T]:
        """Return a decorator that registers the function or class below it as `name`.

        Args:
            name: unique in this registry.
            check: takes the whole config and raises ConfigError for settings that the entry cannot work with.

        Raises:
            ValueError: another function or class has the name.
        """

        def add(entry: T) -> T:
            self.add(name, entry, check=check)
            return entry

        return add

    def add(self, name: str, entry: T, *, source: Any = None, check: Check | None = None) -> None:
        """Register `entry` as `name`. `source` is the function that it was made of, if it is not the function "
        "itself."""
        source = entry if source is None else source
        taken = self._sources.get(name)
        if taken is not None and _origin(taken) != _origin(source):
            raise ValueError(f"{self.kind} '{name}' is registered already, by {_origin(taken)}: choose another name")
        self._entries[name], self._sources[name] = entry, source
        if check is not None:
            self._checks[name] = check

    @contextlib.contextmanager
    def holding(self, name: str, entry: T) -> Iterator[None]:
        """Let `name` stand for `entry` within, whatever it stands for otherwise: an object without an address."""
        before = self._entries.get(name)
        self._entries[name] = entry
        try:
            yield
        finally:
            del self._entries[name]
            if before is not None:
                self._entries[name] = before

    def check(self, name: str, config: Any) -> None:
        """Raise ConfigError if there is no entry called `name`, or if its own check refuses the config."""
        entry = self.get(name)
        for known, check in self._checks.items():
            if known == name or (":" in name and self._entries[known] is entry):
                check(config)

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        self._import_until(None)
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """Return the entry called `name`, or the one that `module:attribute` or `path/file.py:attribute` points to.

        Raises:
            ConfigError: there is none. The message suggests the nearest name.
        """
        if ":" not in name:
            self._import_until(name)
        if name in self._entries:
            return self._entries[name]
        if ":" in name:
            return self._load(name)
        near = difflib.get_close_matches(name, self._entries, n=3)
        near.sort(key=lambda known: sorted(known) != sorted(name))  # the same letters first: "gpro" is grpo, not gspo
        hint = f"did you mean '{near[0]}'? " if near else ""
        place = f"{self.key}: " if self.key else ""
        raise ConfigError(
            f"{place}unknown {self.kind} '{name}': {hint}Known: {', '.join(self.names())}; or point to your own with "
            f"'package.module:name' or 'path/file.py:name'"
        )

    def _import_until(self, name: str | None) -> None:
        """Import the package's modules, the one called `name` first, until `name` is registered; all for None."""
        if not self._package:
            return
        modules = [found.name for found in pkgutil.iter_modules(importlib.import_module(self._package).__path__)]
        for module in sorted(fnmatch.filter(modules, self._modules), key=lambda module: module != name):
            if name in self._entries:
                return
            importlib.import_module(f"{self._package}.{module}")

    def _load(self, name: str) -> T:
        place, _, attribute = name.rpartition(":")
        module = self._import_file(name, place) if place.endswith(".py") else self._import_module(name, place)
        if not hasattr(module, attribute):
            raise ConfigError(f"{self.kind} '{name}': {place} has no '{attribute}'")
        found = getattr(module, attribute)
        if not callable(found):
            raise ConfigError(
                f"{self.kind} '{name}': {attribute} is {found!r:.60} ({type(found).__name__}), it must be a function "
                f"or a class"
            )
        return next((self._entries[known] for known, source in self._sources.items() if source is found), found)

    def _import_module(self, name: str, place: str) -> ModuleType:
        try:
            with _folder_on_path(Path.cwd()), _while_importing(place):
                return importlib.import_module(place)
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            reason = error if isinstance(error, ImportError) else repr(error)
            raise ConfigError(f"{self.kind} '{name}': module '{place}' cannot be imported: {reason}") from error

    def _import_file(self, name: str, place: str) -> ModuleType:
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"{self.kind} '{name}': there is no file {path}")
        # One module per file, however many entries are taken from it, so that its own @register_... runs once.
        folder = "grpo_file_" + hashlib.sha256(str(path.parent).encode()).hexdigest()[:12]
        module_name = f"{folder}.{path.stem}"
        if module_name in sys.modules:
            return sys.modules[module_name]
        if folder not in sys.modules:  # a package, so that `from .sibling import x` works too
            package = ModuleType(folder)
            package.__path__ = [str(path.parent)]
            sys.modules[folder] = package
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            with _folder_on_path(path.parent), _while_importing(str(path)):
                spec.loader.exec_module(module)
        except ConfigError:
            del sys.modules[module_name]
            raise
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise ConfigError(f"{self.kind} '{name}': {path} cannot be imported: {error!r}") from error
        return module


_importing: list[str] = []


@contextlib.contextmanager
def _while_importing(place: str) -> Iterator[None]:
    _importing.append(place)
    try:
        yield
    finally:
        _importing.pop()


def check_is_no_import() -> None:
    """Raise ConfigError if training starts while a file is imported for one of its functions."""
    if _importing:
        raise ConfigError(
            f"{_importing[-1]} starts to train while it is imported for one of its functions: put the call below "
            f"`if __name__ == '__main__':`"
        )


@contextlib.contextmanager
def _folder_on_path(folder: Path) -> Iterator[None]:
    """Let code import the modules beside it: first of all while it is imported, as a script does, and last later on."""
    text = str(folder)
    known = text in sys.path
    sys.path.insert(0, text)
    try:
        yield
    finally:
        sys.path.remove(text)
        if not known:
            sys.path.append(text)


def call_with_supported_args(function: Callable[..., T], offered: Mapping[str, Any], *args: Any) -> T:
    """Call `function` with `args` and with those of the `offered` keyword arguments that it names."""
    names = [name for name in inspect.signature(function).parameters if name in offered]
    return function(*args, **{name: offered[name] for name in names})


def check_arguments(
    label: str,
    function: Callable[..., Any],
    offered: Collection[str],
    kwargs: Mapping[str, Any],
    key: str = "",
    given: str = "",
) -> None:
    """Check that `function` can be called by name with the `offered` arguments and with the user's own `kwargs`.

    Args:
        label: the component in messages: "objective.loss_type 'mine'".
        function: the component.
        offered: names of the arguments that the trainer gives.
        kwargs: the user's settings for this component.
        key: the config key of `kwargs`, if there is one: "objective.loss_kwargs".
        given: `offered` in words, for messages.

    Raises:
        ConfigError: an argument that nothing gives, a setting that is no argument, or one that the trainer gives.
    """
    own = [p for p in inspect.signature(function).parameters.values() if p.name not in offered]
    own = [p for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [parameter.name for parameter in own]
    for name in kwargs:
        if name in offered:
            raise ConfigError(f"{key} has '{name}', which the trainer gives to {label} itself: remove it from {key}")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"its own arguments are: {', '.join(names) or 'none'}"
            raise ConfigError(f"{key} has '{name}', which is no argument of {label}: {hint}")
    for parameter in own:
        if parameter.default is parameter.empty and parameter.name not in kwargs:
            raise ConfigError(
                f"{label} requires the argument '{parameter.name}', but the trainer gives "
                f"{given or ', '.join(offered)}. Rename it, give it a default{f', or set it in {key}' if key else ''}"
            )


def _origin(source: object) -> str:
    """Return file and name. A module that was imported under two names is one origin."""
    module = sys.modules.get(getattr(source, "__module__", None) or "")
    place = getattr(module, "__file__", None) or getattr(source, "__module__", "?")
    name = getattr(source, "__qualname__", repr(source))
    return f"{place}:{name}" if getattr(module, "__file__", None) else f"{place}.{name}"
