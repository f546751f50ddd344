"""Parser: files and flags -> one checked Config. Imports no torch."""

import dataclasses
import difflib
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from grpo.config.help import help_text, show_help
from grpo.config.schema import Config, flatten
from grpo.config.setting import Key, keys_of
from grpo.config.texts import StrictLoader, read_text
from grpo.config.validation import check_config
from grpo.config.values import converted, shown
from grpo.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"
Values = dict[str, Any]
"""Flat config key -> value."""


def load_config(argv: list[str] | None = None) -> Config:
    """Return the checked config of a command line.

    Args:
        argv: `--config FILE ...` and `--key.subkey VALUE`; default: sys.argv[1:]. `--help [SECTION]` prints the keys
            and exits with 0.

    Raises:
        ConfigError: names the key, the value and the fix.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    for word in ("-h", "--help"):
        if word in argv:
            show_help(help_text(Config, "".join(argv[argv.index(word) + 1 :][:1])))
            raise SystemExit(0)
    files, flags = _split_config_files(argv)
    own: Values = {}
    for file in files:
        own.update(_read_yaml(file))  # flat keys: a later file wins key by key
    values = _with_flags(own, flags)
    if values.get("model.name", Config().model.name) == "starter":
        values = _with_flags(_starter(values) | own, flags)
    config = build_config(values)
    check_config(config)
    return config


def build_config(values: Values, cls: type = Config, prefix: str = "") -> Any:
    """Return a Config with these values, and defaults elsewhere. Values are not checked."""
    arguments = {}
    for spec in dataclasses.fields(cls):
        name, factory = f"{prefix}{spec.name}", spec.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            arguments[spec.name] = build_config(values, factory, f"{name}.")
        elif name in values:
            arguments[spec.name] = converted(values[name], keys_of(Config)[name].type)
    return cls(**arguments)


def _starter(values: Values) -> Values:
    """Return the preset of the tiny model. Rows of one's own take the place of its generated problems."""
    preset = _read_yaml(PRESETS / "starter.yaml")
    if values.get("data.path") is not None:
        preset["data.name"] = "question_answer"
    return preset


def _with_flags(values: Values, flags: list[str]) -> Values:
    """Return the values, changed by flags from left to right."""
    values, keys, place = dict(values), keys_of(Config), 0
    while place < len(flags):
        word = flags[place]
        place += 1
        if not re.match(r"--\w", word):
            raise ConfigError(f"'{word}' is not a flag: flags are --key VALUE. Put a value that has spaces into quotes")
        name, equals, inline = word[2:].partition("=")
        key = _key_of_flag(name, inline if equals else "".join(flags[place : place + 1]))
        words = [inline] if equals else []
        while not equals and place < len(flags) and not re.match(r"--\w", flags[place]):
            words.append(flags[place])
            place += 1
            if keys[key].type != list[str]:
                break
        if not words:
            raise ConfigError(f"--{name} has no value: write --{name} VALUE")
        _set(values, keys[key], name, words)
    return values


def _set(values: Values, key: Key, name: str, words: list[str]) -> None:
    """Set a key, add to a list (--key+ VALUE), or set one entry of a mapping (--key.entry VALUE)."""
    entry = name.removeprefix(key.name).removeprefix(".").removesuffix("+")
    try:
        if entry:
            inner = {dict[str, float]: float, dict[str, dict[str, Any]]: dict}.get(key.type, Any)
            value = read_text(words[0], inner)
            if inner is dict and not isinstance(value, dict):  # --reward_kwargs.NAME.ARGUMENT VALUE
                entry, _, argument = entry.rpartition(".")
                value = {**_entries(values, key).get(entry, {}), argument: value}
            value = {**_entries(values, key), entry: value}
        elif len(words) > 1:
            value = words
        else:
            value = read_text(words[0], key.type)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{name} is {words[0]!r}, not valid YAML: {getattr(error, 'problem', error)}") from error
    value = converted(value, key.type)
    if name.endswith("+") and isinstance(value, list):
        value = [*converted(values.get(key.name, key.default), key.type), *value]
    values[key.name] = value


def _entries(values: Values, key: Key) -> dict[str, Any]:
    entries = converted(values.get(key.name, key.default), key.type)
    return entries if isinstance(entries, dict) else {}


def _key_of_flag(name: str, value: str) -> str:
    """Return the config key that a flag sets. Raises ConfigError for an unknown one."""
    keys = keys_of(Config)
    name = name.removesuffix("+")
    if name in keys:
        return name
    for key in keys.values():
        if name.startswith(f"{key.name}.") and str(key.type).startswith("dict"):
            return key.name
    if any(known.startswith(f"{name}.") for known in keys):
        raise ConfigError(f"--{name} is a section: set its keys, for example --{_first_key(name)} VALUE")
    _refuse_secrets(name)
    given = f" (value {value!r})" if value and not value.startswith("--") else ""
    raise ConfigError(f"unknown flag --{name}{given}{_did_you_mean(name)}")


def _split_config_files(argv: list[str]) -> tuple[list[str], list[str]]:
    """["--config", "a.yaml", "b.yaml", "--steps", "3"] -> (["a.yaml", "b.yaml"], ["--steps", "3"])"""
    files: list[str] = []
    flags: list[str] = []
    taking_files = False
    for word in argv:
        if word == "--config":
            taking_files = True
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        elif taking_files and not word.startswith("--"):
            files.append(word)
        else:
            taking_files = False
            flags.append(word)
    return files, flags


def _read_yaml(file: str | Path) -> Values:
    """Read a config file as flat keys. Raises ConfigError for an unknown key."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"--config: there is no file {file}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}{context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, holds a {type(content).__name__}")
    flat, known = flatten(content), keys_of(Config)
    for key, value in flat.items():
        if key in known:
            continue
        _refuse_secrets(key, f"{path}: ")
        if any(name.startswith(f"{key}.") for name in known):
            raise ConfigError(
                f"{path}: {key} is {shown(value)}, but it is a section: write keys such as "
                f"{_first_key(key).removeprefix(key + '.')} below it, or remove the line"
            )
        raise ConfigError(f"{path}: unknown key '{key}' (value {value!r}){_did_you_mean(key)}")
    return flat


def _first_key(section: str) -> str:
    return next(name for name in keys_of(Config) if name.startswith(f"{section}."))


def _did_you_mean(key: str) -> str:
    known = list(keys_of(Config))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    leaf = [candidate for candidate in known if candidate.split(".")[-1] == key.split(".")[-1]]
    best = leaf[:1] or near
    return f": did you mean '{best[0]}'?" if best else ". See --help for all keys"


def _refuse_secrets(key: str, place: str = "") -> None:
    """Raise ConfigError for a key that looks like a secret, without repeating its value."""
    if re.search(r"token$|api_?key|secret|passw", key.lower()):
        raise ConfigError(
            f"{place}there is no key '{key}': secrets belong neither into a config nor on a command line, where "
            f"others can read them. Put HF_TOKEN or WANDB_API_KEY into .env (see .env.example)"
        )
