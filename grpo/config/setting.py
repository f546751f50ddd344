"""Setting: the declaration of one config key beside its default, and the list of all keys of a dataclass of settings.

    learning_rate: float = setting(1e-6, "[0, inf)", resume="free", common=True, trl="learning_rate")
    # and below it, as a string, the text of the key

Validation, help, the rules of resume and docs/config.md read these declarations. None of them has a list of its own.
"""

import ast
import copy
import dataclasses
import functools
import inspect
import sys
from dataclasses import dataclass
from typing import Any, Literal

from grpo.config.values import has_type, shown, type_in_words, wrong_part
from grpo.errors import ConfigError

Resume = Literal["free", "needs a flag", "forbidden"]
"""May a resumed run find the key changed? free: yes. needs a flag: with --allow_changes. forbidden: never."""


@dataclass(frozen=True)
class Interval:
    """A range of numbers, written as in mathematics: "[1, inf)", "(0, 1]". NaN is in none."""

    text: str

    @functools.cached_property
    def ends(self) -> tuple[float, float]:
        low, high = (end.strip() for end in self.text[1:-1].split(","))
        return _number(low), _number(high)

    def holds(self, value: float) -> bool:
        """Is `value` in the range?"""
        low, high = self.ends
        above = value >= low if self.text[0] == "[" else value > low
        return above and (value <= high if self.text[-1] == "]" else value < high)

    def __str__(self) -> str:
        """In words: "at least 1", "above 0 and at most 1"."""
        low, high = self.ends
        if self.text[0] == "[" and self.text[-1] == "]" and high < float("inf"):
            return f"between {low} and {high}"
        words = []
        if low > -float("inf"):
            words.append(f"{'at least' if self.text[0] == '[' else 'above'} {low}")
        if high < float("inf"):
            words.append(f"{'at most' if self.text[-1] == ']' else 'below'} {high}")
        return " and ".join(words) or "finite"


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)


@dataclass(frozen=True)
class Setting:
    """Metadata of one config key."""

    range: Interval | None = None
    why: str = ""
    """Reason for the range, added to the error."""
    resume: Resume = "needs a flag"
    common: bool = False
    """`--help` gives the key a line of its own; the others are listed by name."""
    trl: str | None = None
    """TRL's name for the same thing."""
    path: bool = False
    """The value is a file or a folder, or may be one: ~ is the home folder."""


def setting(
    default: Any,
    range: str | None = None,
    *,
    why: str = "",
    resume: Resume = "needs a flag",
    common: bool = False,
    trl: str | None = None,
    path: bool = False,
) -> Any:
    """Return a dataclass field with its default and the metadata of a config key (see Setting).

    Args:
        default: a list or dict is copied for each instance.
        range: the accepted numbers, for example "[0, 1)". null is accepted where the type allows it.
    """
    metadata = {"setting": Setting(Interval(range) if range else None, why, resume, common, trl, path)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Key:
    """One config key with everything that is declared about it."""

    name: str
    """With its section: "sampling.top_p"."""
    type: Any
    default: Any
    text: str
    setting: Setting

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0] or "run"

    def check(self, value: Any) -> None:
        """Raise ConfigError for a value of another type (null included), or a number outside the range."""
        if not has_type(value, self.type):
            name, wrong, kind = wrong_part(self.name, value, self.type)
            quotes = ": put it into quotes" if kind in (str, str | None) and wrong is not None else ""
            raise ConfigError(f"{name} is {shown(wrong)}, needs {type_in_words(kind)}{quotes}")
        if self.type == str | None and str(value).lower() == "none" and value is not None:
            raise ConfigError(f"{self.name} is {value!r}, needs {type_in_words(self.type)}: write null for no value")
        if self.type == list[str] and [str(item).lower() for item in value] == ["none"]:
            raise ConfigError(f"{self.name} is {value!r}, needs {type_in_words(self.type)}: write [] for none")
        if isinstance(value, str) and not value.strip():
            raise ConfigError(f"{self.name} is {value!r}, needs {type_in_words(self.type)} that is not empty")
        limits = self.setting.range
        if limits is None or value is None or limits.holds(value):
            return
        needs = f"needs {limits}" if str(limits).startswith("at least") else f"needs to be {limits}"
        why = f": {self.setting.why}" if self.setting.why else ""
        raise ConfigError(f"{self.name} is {value}, {needs}{why}")


@functools.cache
def keys_of(settings: type) -> dict[str, Key]:
    """Return every key of a dataclass whose fields may be dataclasses themselves, in the order of the file."""
    keys: dict[str, Key] = {}
    texts = _texts(settings)
    for field in dataclasses.fields(settings):
        factory = field.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            for key in keys_of(factory).values():
                keys[f"{field.name}.{key.name}"] = dataclasses.replace(key, name=f"{field.name}.{key.name}")
        else:
            default = field.default if factory is dataclasses.MISSING else factory()
            declared = field.metadata.get("setting", Setting())
            keys[field.name] = Key(field.name, field.type, default, texts.get(field.name, ""), declared)
    return keys


def _texts(settings: type) -> dict[str, str]:
    """Read the string below each field from the source: Python does not keep it."""
    tree = ast.parse(inspect.getsource(sys.modules[settings.__module__]))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == settings.__name__).body
    found = {}
    for field, below in zip(body, body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            found[field.target.id] = " ".join(below.value.value.split())
    return found
