"""Config help: the config's dataclasses and the text below their fields -> what `--help` prints.

--help           every section: the keys that people change most, a line each; the others by name
--help sampling  one section in full
--help all       everything in full
"""

import ast
import dataclasses
import inspect
import os
import sys
import textwrap
from typing import Any

COMMON = {
    "run": "seed steps num_train_epochs run_dir resume eval_every save_every prompts_per_step tokens_per_batch rewards",
    "model": "name gradient_checkpointing",
    "lora": "r lora_alpha",
    "data": "name path eval_path question answer extractor system_prompt max_prompt_length",
    "curriculum": "reward",
    "sampling": "num_generations max_completion_length temperature",
    "objective": "loss_type beta epsilon epsilon_high num_iterations scale_rewards",
    "optimizer": "learning_rate warmup_ratio lr_scheduler_type max_grad_norm",
    "rollout": "engine slots",
    "scoring": "deadline on_error",
    "tracking": "report_to run_name",
}
"""The keys that `--help` gives a line each. A section that is not here shows all its keys by name."""
USAGE = "accelerate launch launch/train.py [--config FILE ...] [--key.subkey VALUE ...]"
_WIDTH = 110
_COLUMN = 42


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting."""

    flag: str
    default: Any
    text: str
    """What stands below the field in its class; "" where its name says it all."""


def show_help(text: str) -> None:
    """Print it. `--help | head` closes the pipe before everything is written: that is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # what is left would fail again when Python exits


def help_text(settings: type, topic: str = "") -> str:
    """What `--help [topic]` prints for a dataclass of settings. An unknown topic gets the short text, and says so."""
    sections = sections_of(settings)
    if topic == "all":
        return "\n\n".join(_in_full(name, keys) for name, keys in sections.items())
    if topic in sections:
        return _in_full(topic, sections[topic])
    lines = [f"usage: {USAGE}", ""]
    if topic:
        lines += [f"There is no section '{topic}'.", ""]
    lines += textwrap.wrap(
        "GRPO training. Every key is a flag and a line of a YAML file, files are read left to right, and flags win. "
        f"Defaults are shown. `--help SECTION` explains all keys of one section ({', '.join(sections)}); `--help all` "
        f"explains everything; `python launch/check.py` with the same flags tries them without training.",
        _WIDTH,
    )
    for name, keys in sections.items():
        common = COMMON.get(name, "").split()
        lines += ["", name]
        lines += [line for key in keys if _leaf(key) in common for line in _short(key)]
        others = [_leaf(key) for key in keys if _leaf(key) not in common]
        if others:
            lines += textwrap.wrap(
                "more: " + ", ".join(others), _WIDTH, initial_indent="  ", subsequent_indent="        "
            )
    return "\n".join(lines)


def sections_of(settings: type) -> dict[str, list[Key]]:
    """{"run": the keys without a dot, "model": ..., ...} of a dataclass whose fields may be dataclasses."""
    sections: dict[str, list[Key]] = {"run": []}
    texts = _texts(settings)
    for spec in dataclasses.fields(settings):
        inner = spec.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            below = _texts(inner)
            sections[spec.name] = [
                Key(f"{spec.name}.{field.name}", _default(field), below.get(field.name, ""))
                for field in dataclasses.fields(inner)
            ]
        else:
            sections["run"].append(Key(spec.name, _default(spec), texts.get(spec.name, "")))
    return sections


def _texts(settings: type) -> dict[str, str]:
    """The string below each field, which Python itself forgets: read from the source."""
    tree = ast.parse(inspect.getsource(sys.modules[settings.__module__]))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == settings.__name__).body
    found = {}
    for field, below in zip(body, body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            found[field.target.id] = " ".join(below.value.value.split())
    return found


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _leaf(key: Key) -> str:
    return key.flag.rpartition(".")[2]


def _shown(key: Key) -> str:
    """As one would type it."""
    value = key.default
    if value is None or isinstance(value, bool):
        return f"--{key.flag} {'null' if value is None else str(value).lower()}"
    return f"--{key.flag} {value}"


def _short(key: Key) -> list[str]:
    first, _, _ = key.text.partition(". ")
    return _aligned(key, textwrap.shorten(first.rstrip("."), _WIDTH - _COLUMN, placeholder=" ..."))


def _in_full(name: str, keys: list[Key]) -> str:
    return "\n".join([name, *(line for key in keys for line in _aligned(key, key.text))])


def _aligned(key: Key, text: str) -> list[str]:
    flag = f"  {_shown(key)}"
    lines = textwrap.wrap(text, _WIDTH - _COLUMN) or [""]
    if len(flag) > _COLUMN - 2:
        return [flag, *(" " * _COLUMN + line for line in lines if line)]
    return [(flag.ljust(_COLUMN) + lines[0]).rstrip(), *(" " * _COLUMN + line for line in lines[1:])]
