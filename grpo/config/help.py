"""Config help: the declarations of the schema -> what `--help` prints, and docs/config.md.

--help           every section: the most common keys, a line each; the others by name
--help sampling  one section in full
--help all       everything in full
"""

import os
import sys
import textwrap
from itertools import groupby

from grpo.config.setting import Key, keys_of

USAGE = "accelerate launch launch/train.py [--config FILE ...] [--key.subkey VALUE ...]"
_WIDTH = 110
_COLUMN = 42


def show_help(text: str) -> None:
    """Print `text`. A pipe that closes early (`--help | head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # else Python would fail again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text(settings: type, topic: str = "") -> str:
    """Return what `--help [topic]` prints for a dataclass of settings. An unknown topic gets the short text."""
    sections = sections_of(settings)
    if topic == "all":
        return "\n\n".join(_in_full(name, keys) for name, keys in sections.items())
    if topic in sections:
        return _in_full(topic, sections[topic])
    lines = [f"usage: {USAGE}", ""]
    if topic:
        lines += [f"There is no section '{topic}'.", ""]
    lines += textwrap.wrap(
        "GRPO training. Every key is a flag and a line of a YAML file. Files are read left to right, and flags take "
        f"precedence. Defaults are shown. `--help SECTION` explains one section ({', '.join(sections)}), `--help all` "
        f"all of them. `python launch/check.py` with the same flags checks them without training.",
        _WIDTH,
    )
    for name, keys in sections.items():
        lines += ["", name]
        lines += [line for key in keys if key.setting.common for line in _short(key)]
        others = [key.leaf for key in keys if not key.setting.common]
        if others:
            lines += textwrap.wrap(
                "more: " + ", ".join(others), _WIDTH, initial_indent="  ", subsequent_indent="        "
            )
    return "\n".join(lines)


def config_page(settings: type) -> str:
    """Return docs/config.md: every key with its default, range, resume class, name in TRL and text."""
    lines = [
        "# Config keys",
        "",
        "Every key is a flag (`--sampling.top_p 1.0`) and a line of a YAML file. `resume` says whether the key may",
        "change when a run is resumed: freely, with `--allow_changes '[KEY]'`, or never. Generated from",
        "`grpo/config/schema.py` by",
        '`python -c "from grpo.config.help import *; from grpo.config.schema import *; print(config_page(Config))"`.',
    ]
    for name, keys in sections_of(settings).items():
        lines += ["", f"## {name}"]
        for key in keys:
            limits = f", {key.setting.range}" if key.setting.range else ""
            trl = f", TRL's `{key.setting.trl}`" if key.setting.trl else ""
            head = f"**`{key.name}`** (default `{_value(key)}`{limits}{trl}; resume: {key.setting.resume})"
            *first, last = textwrap.wrap(head, 118, break_on_hyphens=False, break_long_words=False)
            lines += ["", *first, f"{last}  "]  # two spaces: a line break
            lines += textwrap.wrap(key.text, 118, break_on_hyphens=False, break_long_words=False)
    return "\n".join(lines)


def sections_of(settings: type) -> dict[str, list[Key]]:
    """Return {"run": the keys without a dot, "model": ..., ...} of a dataclass whose fields may be dataclasses."""
    keys = keys_of(settings).values()
    return {name: list(group) for name, group in groupby(keys, key=lambda key: key.section)}


def _value(key: Key) -> str:
    """Return the default as it is typed in a flag."""
    value = key.default
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _short(key: Key) -> list[str]:
    first, _, _ = key.text.partition(". ")
    return _aligned(key, textwrap.shorten(first.rstrip("."), _WIDTH - _COLUMN, placeholder=" ..."))


def _in_full(name: str, keys: list[Key]) -> str:
    return "\n".join([name, *(line for key in keys for line in _aligned(key, key.text + _renamed(key)))])


def _renamed(key: Key) -> str:
    return f" [TRL: {key.setting.trl}]" if key.setting.trl not in (None, key.leaf) else ""


def _aligned(key: Key, text: str) -> list[str]:
    flag = f"  --{key.name} {_value(key)}"
    lines = textwrap.wrap(text, _WIDTH - _COLUMN) or [""]
    if len(flag) > _COLUMN - 2:
        return [flag, *(" " * _COLUMN + line for line in lines if line)]
    return [(flag.ljust(_COLUMN) + lines[0]).rstrip(), *(" " * _COLUMN + line for line in lines[1:])]
