"""Parser: files and flags -> one checked Config. The only file that knows jsonargparse; imports no torch."""

import dataclasses
import difflib
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from grpo.config.help import help_text, show_help
from grpo.config.schema import Config, flatten, to_dict
from grpo.config.validation import check_config
from grpo.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"


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
    parser = build_parser()
    files, flags = _split_config_files(argv)
    layers = [_read_yaml(path) for path in files]
    config = _parse(parser, layers, flags)
    if config.model.name == "starter":
        config = _parse(parser, [_read_yaml(PRESETS / "starter.yaml"), *layers], flags)
    check_config(config)
    return config


def build_parser() -> ArgumentParser:
    """Return the parser, with one flag per config key."""
    parser = ArgumentParser(
        prog="launch/train.py",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config")
    parser.add_class_arguments(Config)
    return parser


def _parse(parser: ArgumentParser, layers: list[dict[str, Any]], flags: list[str]) -> Config:
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(layer)  # flat keys: a later file wins key by key
    try:
        from_files = parser.parse_object(_nest(merged)) if merged else parser.get_defaults()
        # A fresh parser per call would cost half a second; defaults are reset by the next call's own values.
        values = parser.parse_args(flags, namespace=from_files.clone())
    except SystemExit as error:
        raise ConfigError(f"cannot read the command line: {' '.join(flags)}") from error
    except Exception as error:
        raise ConfigError(_readable(str(error), parser)) from error
    return _build(Config, values)


def _build(cls: type, values: Namespace) -> Any:
    arguments = {}
    for spec in dataclasses.fields(cls):
        value = getattr(values, spec.name)
        nested = spec.default_factory if dataclasses.is_dataclass(spec.default_factory) else None
        arguments[spec.name] = _build(nested, value) if nested else value
    return cls(**arguments)


def _known_keys() -> list[str]:
    return list(flatten(to_dict(Config())))


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return nested


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


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys, and reads 5e-6 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a config file as flat keys. Raises ConfigError for an unknown key."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--config: there is no file {path}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
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
    flat = flatten(content)
    for key, value in flat.items():
        if key not in _known_keys():
            _refuse_secrets(key, f"{path}: ")
            raise ConfigError(f"{path}: unknown key '{key}' (value {value!r}){_did_you_mean(key)}")
    return flat


def _did_you_mean(key: str) -> str:
    known = _known_keys()
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


_KINDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}


def _readable(message: str, parser: ArgumentParser) -> str:
    """Reword a message of jsonargparse: key, value, fix."""
    unknown = re.search(r"unrecognized arguments: --([^\s=]+)(?:[\s=]+(\S+))?", message, re.IGNORECASE)
    if unknown:
        key, value = unknown.groups()
        _refuse_secrets(key)
        return f"unknown flag --{key}{f' (value {value!r})' if value else ''}{_did_you_mean(key)}"
    lone = re.fullmatch(r"argument --(\S+): expected one argument", message.strip())
    if lone:
        return f"--{lone[1]} has no value: write --{lone[1]} VALUE"
    typed = re.search(r'"([\w.]+)":\s+Expected a (.+?)\. Got value: (.*)', message, re.DOTALL)
    if typed:
        key, kind, value = typed.groups()
        choices = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
        name = re.fullmatch(r"<class '(\w+)'>", kind)
        needed = f"one of {choices[1]}" if choices else _KINDS.get(name[1] if name else "", kind)
        return f"{key} is {value.strip()!r}, needs {needed}"
    return message.replace("Parser key ", "").strip()
