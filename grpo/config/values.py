"""Values: a plain value of a file, a flag or Python -> the type that its config key declares."""

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal


def converted(value: Any, kind: Any) -> Any:
    """Return `value` as its key needs it, where no meaning is lost; anything else unchanged, for `has_type` to refuse.

    wandb -> [wandb] and "a, b" -> [a, b] for a list; accuracy -> {accuracy: 1.0} for numbers by name; 1 -> 1.0
    """
    for member in members_of(kind):
        if member is float and isinstance(value, int) and not isinstance(value, bool):
            return _float(value)
        if typing.get_origin(member) is list and isinstance(value, str) and str not in members_of(kind):
            return _names(value)
        if member == dict[str, float]:
            names = _names(value) if isinstance(value, str) else value
            if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
                return dict.fromkeys(names, 1.0)
            if isinstance(value, Mapping):
                return {name: converted(number, float) for name, number in value.items()}
    return value


def has_type(value: Any, kind: Any) -> bool:
    """Return whether `value` has the annotated type. Types other than plain ones, lists and mappings are not checked.

    An int is a float, a bool is no number.
    """
    members = members_of(kind)
    if len(members) > 1:
        return any(has_type(value, member) for member in members)
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (bool, str, types.NoneType):
        return isinstance(value, origin)
    if origin is list:
        return isinstance(value, list) and all(has_type(item, arguments[0]) for item in value if arguments)
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) and arguments else ()
        return isinstance(value, dict) and all(
            has_type(k, arguments[0]) and has_type(v, arguments[1]) for k, v in pairs
        )
    return True


def type_in_words(kind: Any) -> str:
    """Return what a key needs: "a whole number", "text or null", "one of 'group', 'batch', 'none'"."""
    return " or ".join(_in_words(member) for member in members_of(kind))


def wrong_part(name: str, value: Any, kind: Any) -> tuple[str, Any, Any]:
    """Return the key, value and type of the first entry of a mapping that has another type; else those given."""
    if typing.get_origin(kind) is dict and isinstance(value, Mapping):
        inner = typing.get_args(kind)[1]
        for entry, held in value.items():
            if isinstance(entry, str) and not has_type(held, inner):
                return f"{name}.{entry}", held, inner
    return name, value, kind


def shown(value: Any) -> str:
    """Return a value as a message shows it: 'text', 3, null, true."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _in_words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    words = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        types.NoneType: "null",
        list[str]: "a list of names: [NAME, NAME]",
        list[dict[str, Any]]: "a list of rows: [{COLUMN: VALUE}]",
        dict[str, float]: "a mapping of names to numbers: {NAME: 1.0}",
        dict[str, dict[str, Any]]: "a mapping of names to mappings: {NAME: {ARGUMENT: VALUE}}",
        dict[str, Any]: "a mapping: {NAME: VALUE}",
    }
    return words.get(kind, str(kind))


def members_of(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else -float("inf")
