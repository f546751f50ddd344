"""Fields of GRPOConfig: each declares what becomes of it, in one place that the translation and docs/trl.md read."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["mapped", "no effect", "refused"]


@dataclass(frozen=True)
class Outcome:
    """Treatment of one field of TRL's GRPOConfig."""

    kind: Kind
    text: str
    """mapped: the config keys; no effect: the reason; refused: the reason and what to use instead."""
    verbatim: bool = False
    """mapped: `text` is one key, which gets the value as it is."""
    accepts: tuple[Any, ...] = ()
    """refused, no effect: values besides the default that ask for what happens here in any case."""


class Help(str):
    """The help text of a field, with its outcome: transformers' HfArgumentParser takes no other metadata."""

    outcome: Outcome


def copied(default: Any, key: str) -> Any:
    """Declare a field that is `key` under another name."""
    return _declare(default, Outcome("mapped", key, verbatim=True))


def mapped(default: Any, to: str) -> Any:
    """Declare a field that the translation turns into `to`."""
    return _declare(default, Outcome("mapped", to))


def no_effect(default: Any, reason: str, *accepts: Any) -> Any:
    """Declare a field that changes nothing here, of which `accepts` are not worth a message."""
    return _declare(default, Outcome("no effect", reason, accepts=accepts))


def refused(default: Any, reason: str, *accepts: Any) -> Any:
    """Declare a field that has to keep its default, or one of the values `accepts`."""
    return _declare(default, Outcome("refused", reason, accepts=accepts))


def _declare(default: Any, outcome: Outcome) -> Any:
    text = Help(f"{outcome.kind}: {outcome.text}".replace("%", "%%"))
    text.outcome = outcome
    metadata = {"help": text}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def outcomes(arguments: type) -> dict[str, Outcome]:
    """Return what becomes of every field of the dataclass `arguments`, by name."""
    return {field.name: field.metadata["help"].outcome for field in dataclasses.fields(arguments)}


def default_of(field: dataclasses.Field) -> Any:
    """Return the default of a field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def changed(arguments: Any) -> dict[str, Any]:
    """Return the fields that do not have their default, by name."""
    values = {field: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}
    return {field.name: value for field, value in values.items() if value != default_of(field)}
