"""The command `grpo migrate`: a script for TRL -> config.yaml and rewards.py for launch/train.py. Nothing is run.

    grpo migrate script.py [--output FOLDER]          FOLDER: migrated/ by default

Prints what becomes of each argument. What cannot be read from the text is named, with the key to set by hand.
"""

import ast
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from grpo.compat.arguments import GRPOConfig
from grpo.compat.fields import changed, outcomes
from grpo.compat.script import Script, Unknown, called, read_script
from grpo.compat.translate import Translation, translate
from grpo.config.schema import Config, flatten, to_dict
from grpo.errors import ConfigError
from grpo.tools.arguments import command_parser

HUB_ROWS = 1000
"""Rows that the arithmetic assumes where the size of the data is not known; `num_train_epochs` is written instead."""


@dataclass
class Migration:
    """Result of `grpo migrate`."""

    config: dict[str, Any]
    """Flat key -> value, without defaults."""
    rewards: str
    """Source of rewards.py; "" where the rewards are no functions of the script."""
    tools: str = ""
    """Source of tools.py; "" where there are none, or none of the script."""
    lines: list[str] = field(default_factory=list)
    """What becomes of each argument."""
    by_hand: list[str] = field(default_factory=list)
    """What cannot be read, with what to set."""


def main(argv: list[str]) -> None:
    """Run the command `grpo migrate`."""
    parser = command_parser("migrate", __doc__)
    parser.add_argument("script", type=Path, help="a Python script that makes TRL's GRPOTrainer")
    parser.add_argument("--output", type=Path, default=Path("migrated"), help="the folder to write")
    options = parser.parse_args(argv)
    try:
        source = options.script.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"migrate: cannot read {options.script}: {error}") from error
    made = migrate(source, options.script.name, options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "config.yaml").write_text(yaml.safe_dump(nested(made.config), sort_keys=False), encoding="utf-8")
    files = {name: text for name, text in (("rewards.py", made.rewards), ("tools.py", made.tools)) if text}
    for name, text in files.items():
        (options.output / name).write_text(text, encoding="utf-8")
    print("\n".join(made.lines))
    if made.by_hand:
        print("\nTo do by hand:\n" + "\n".join(f"- {line}" for line in made.by_hand))
    print(f"\nWritten: {' and '.join([str(options.output / 'config.yaml'), *files])}. Train with")
    print(f"  accelerate launch launch/train.py --config {options.output / 'config.yaml'}")


def migrate(source: str, name: str = "script.py", folder: Path = Path("migrated")) -> Migration:
    """Return what a script becomes.

    Raises:
        ConfigError: It is no script for TRL's GRPOTrainer.
    """
    script = read_script(source, name)
    made = Migration({}, "")
    made.by_hand += script.remarks
    if script.parser is not None:
        made.by_hand.append(
            f"{script.parser} reads the config from the command line or a YAML file, which is not in the script: pass "
            f"the same flags to GRPOTrainer with the import changed, or set the keys of docs/trl.md"
        )
    translation = translate_fields(script, made)
    if translation is not None:
        made.by_hand += translation.remarks
        default = flatten(to_dict(Config()))
        values = flatten(to_dict(translation.config))
        made.config = {key: value for key, value in values.items() if value != default[key]}
        rename_epochs(script, made)
    read_model(script, made)
    read_rewards(script, made, folder)
    read_data(script, made)
    read_tools(script, made, folder)
    for argument in ("callbacks", "optimizers", "rollout_func", "environment_factory"):
        if argument in script.trainer:
            made.by_hand.append(f"GRPOTrainer({argument}=...) has no key: keep the script, with the import changed")
    precision = translation.precision if translation else "no"
    made.lines.append(f"precision -> accelerate launch --mixed_precision {precision}")
    return made


def translate_fields(script: Script, made: Migration) -> Translation | None:
    """Translate the fields that can be read, each on its own first, so that one refused field hides no other."""
    table, usable = outcomes(GRPOConfig), {}
    for field_name, value in script.config.items():
        outcome = table.get(field_name)
        if outcome is None:
            made.by_hand.append(f"{field_name}: TRL 1.16 has no such field")
        elif isinstance(value, Unknown):
            made.by_hand.append(f"{field_name} = {value.source} (line {value.line}) cannot be read: set {outcome.text}")
        elif outcome.kind == "refused" and {field_name: value}.items() <= changed(_alone(field_name, value)).items():
            if value in outcome.accepts:
                continue
            made.by_hand.append(f"{field_name} = {value!r} is not supported: {outcome.text}")
        else:
            usable[field_name] = value
            made.lines.append(f"{field_name} = {value!r} -> {outcome.kind}: {outcome.text}")
    try:
        return translate(GRPOConfig(**usable), HUB_ROWS, {"data.system_prompt": None})
    except ConfigError as error:
        made.by_hand.append(str(error))
        return None


def _alone(name: str, value: Any) -> Any:
    made = GRPOConfig()
    setattr(made, name, value)
    return made


def rename_epochs(script: Script, made: Migration) -> None:
    """Write num_train_epochs where the script has no max_steps: the size of its data is not known here."""
    steps = script.config.get("max_steps", -1)
    if isinstance(steps, int) and steps > 0:
        return
    epochs = script.config.get("num_train_epochs", 3.0)
    made.config.pop("steps", None)
    if isinstance(epochs, int | float):
        made.config["num_train_epochs"] = float(epochs)


def read_model(script: Script, made: Migration) -> None:
    """Read the model and the adapter."""
    node = script.trainer.get("model")
    if isinstance(node, ast.Name) and node.id in script.names:
        node = script.names[node.id]
    if isinstance(node, ast.Call) and called(node) == "from_pretrained" and node.args:
        node = node.args[0]
    value = script.value(node)
    if isinstance(value, str):
        made.config["model.name"] = value
        made.lines.append(f"model = {value!r} -> model.name")
    else:
        shown = value.source if isinstance(value, Unknown) else ast.unparse(node) if node is not None else "missing"
        made.by_hand.append(f"model = {shown} cannot be read: set model.name")
    if "peft_config" not in script.trainer:
        return
    if script.peft is None:
        made.by_hand.append(f"peft_config = {ast.unparse(script.trainer['peft_config'])} cannot be read: set lora.*")
        return
    names = {"r": "lora.r", "lora_alpha": "lora.lora_alpha", "target_modules": "lora.target_modules"}
    names["use_rslora"] = "lora.use_rslora"
    for name, value in ({"r": 8, "lora_alpha": 8} | script.peft).items():
        if name in names and not isinstance(value, Unknown):
            made.config[names[name]] = [value] if isinstance(value, str) else value
            made.lines.append(f"LoraConfig {name} = {value!r} -> {names[name]}")
        elif name == "lora_dropout":
            made.lines.append("LoraConfig lora_dropout -> no effect: every dropout is 0")
        elif name not in ("task_type", "bias", "inference_mode"):
            shown = value.source if isinstance(value, Unknown) else repr(value)
            made.by_hand.append(f"LoraConfig {name} = {shown}: docs/config.md lists what an adapter has")
    if "target_modules" not in script.peft:
        made.by_hand.append("LoraConfig without target_modules adapts peft's default layers: set lora.target_modules")


def read_rewards(script: Script, made: Migration, folder: Path) -> None:
    """Read the rewards, and write the functions of the script with everything that they use to rewards.py."""
    nodes = items_of(script, "reward_funcs")
    given = script.config.get("reward_weights")
    weights = given if given and isinstance(given, list) else [1.0] * len(nodes)
    places, own = read_functions(script, made, "reward", nodes, folder / "rewards.py")
    rewards = {place: weight for place, weight in zip(places, weights, strict=False) if place is not None}
    if rewards:
        made.config["rewards"] = rewards
    made.rewards = functions_source(script, own, "Rewards") if own else ""


def read_tools(script: Script, made: Migration, folder: Path) -> None:
    """Read the tools, and write the functions of the script with everything that they use to tools.py."""
    places, own = read_functions(script, made, "tool", items_of(script, "tools"), folder / "tools.py")
    tools = [place for place in places if place is not None]
    if tools:
        made.config["tools"] = tools
    made.tools = functions_source(script, own, "Tools") if own else ""


def items_of(script: Script, argument: str) -> list[ast.expr]:
    """Return the items of an argument of the trainer: those of a list, or the one that stands for itself."""
    node = script.trainer.get(argument)
    while isinstance(node, ast.Name) and node.id in script.names:
        node = script.names[node.id]
    return node.elts if isinstance(node, ast.List | ast.Tuple) else [node] if node is not None else []


def read_functions(
    script: Script, made: Migration, kind: str, nodes: list[ast.expr], file: Path
) -> tuple[list[str | None], list[str]]:
    """Return the config's name of each function, None for what must be written by hand, and the script's own ones."""
    places: list[str | None] = []
    own: list[str] = []
    for item in nodes:
        if isinstance(item, ast.Name) and item.id in script.functions:
            own.append(item.id)
            places.append(f"{file}:{item.id}")
            made.lines.append(f"{kind} {item.id} -> {file.name}")
        elif isinstance(item, ast.Name) and (place := imported(script.tree, item.id)):
            places.append(f"{place}:{item.id}")
            made.lines.append(f"{kind} {item.id} -> {place}:{item.id}")
        else:
            places.append(None)
            made.by_hand.append(f"{kind} {ast.unparse(item)} is no function at the top of the script: write it as one")
    return places, own


def imported(tree: ast.Module, name: str) -> str | None:
    """Return the module that a name was imported from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            return node.module
    return None


def functions_source(script: Script, functions: list[str], kind: str) -> str:
    """Return the source of these functions with the imports, functions, classes and constants that they use."""
    defined: dict[str, ast.stmt] = {}
    for node in script.tree.body:
        for name in names_of(node):
            defined[name] = node
    needed: list[ast.stmt] = []
    waiting = list(functions)
    while waiting:
        used = defined.get(waiting.pop())
        if used is not None and used not in needed:
            needed.append(used)
            waiting += [part.id for part in ast.walk(used) if isinstance(part, ast.Name)]
    ordered = [node for node in script.tree.body if node in needed]
    parts = [ast.get_source_segment(script.source, _with_decorators(node)) or ast.unparse(node) for node in ordered]
    head = f'"""{kind} of a script for TRL, as grpo migrate has found them."""'
    return "\n\n\n".join([head, *parts]) + "\n"


def names_of(node: ast.stmt) -> list[str]:
    """Return the names that a statement at the top of a module defines."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _with_decorators(node: ast.stmt) -> Any:
    """Return the node, with the lines of its decorators."""
    decorators = getattr(node, "decorator_list", [])
    if not decorators:
        return node
    place = {"lineno": decorators[0].lineno, "col_offset": 0, "end_lineno": node.end_lineno}
    return SimpleNamespace(**place, end_col_offset=node.end_col_offset)


def read_data(script: Script, made: Migration) -> None:
    """Read load_dataset(...) behind train_dataset; a prompt that is built by a function has to be built before."""
    for node in ast.walk(script.tree):
        if not (isinstance(node, ast.Call) and called(node) == "load_dataset" and node.args):
            continue
        name, subset = script.value(node.args[0]), script.value(node.args[1]) if len(node.args) > 1 else None
        given = {keyword.arg: script.value(keyword.value) for keyword in node.keywords}
        files = given.get("data_files")
        path = files if name in ("json", "csv", "parquet") and isinstance(files, str) else name
        if not isinstance(path, str):
            break
        made.config |= {"data.name": "question_answer", "data.path": path}
        made.lines.append(f"load_dataset({path!r}) -> data.path")
        for key, value in (("data.subset", subset or given.get("name")), ("data.split", given.get("split"))):
            if isinstance(value, str) and path == name and value != "train":
                made.config[key] = value
                made.lines.append(f"load_dataset {value!r} -> {key}")
        break
    else:
        made.by_hand.append("train_dataset cannot be read: set data.name and data.path (docs/data.md)")
    calls = {called(node) for node in ast.walk(script.tree)}
    if calls & {"map", "from_list", "from_dict", "from_generator", "filter", "rename_column"}:
        made.by_hand.append(
            "the script changes its rows (map, filter, ...): save them with a column 'prompt', "
            "dataset.to_json('train.jsonl'), and set data.path to that file"
        )


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}"""
    made: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        place = made
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return made
