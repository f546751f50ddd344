"""Reading of a script for TRL: Python source -> the arguments of its GRPOConfig and GRPOTrainer, without running it.

Only literals are evaluated, with names that are bound once to a literal in the script, and dicts, lists and tuples of
them. Everything else is an expression that the migration names.
"""

import ast
from dataclasses import dataclass, field
from typing import Any

from grpo.errors import ConfigError

PARSERS = ("HfArgumentParser", "TrlParser")
CONFIGS = ("GRPOConfig",)
TRAINERS = ("GRPOTrainer",)


@dataclass(frozen=True)
class Unknown:
    """An expression that cannot be read from the text."""

    source: str
    line: int


@dataclass
class Script:
    """Contents of a script."""

    config: dict[str, Any] = field(default_factory=dict)
    """Arguments of GRPOConfig: values, or Unknown."""
    trainer: dict[str, ast.expr] = field(default_factory=dict)
    """Arguments of GRPOTrainer."""
    names: dict[str, ast.expr] = field(default_factory=dict)
    """Variables that are bound exactly once."""
    functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = field(default_factory=dict)
    """Functions at the top of the module."""
    peft: dict[str, Any] | None = None
    """Arguments of LoraConfig."""
    parser: str | None = None
    """Class that reads the config from the command line."""
    remarks: list[str] = field(default_factory=list)
    tree: ast.Module = field(default_factory=lambda: ast.Module([], []))
    source: str = ""

    def value(self, node: ast.expr | None, depth: int = 0) -> Any:
        """Return the value of an expression, or Unknown."""
        if node is None:
            return None
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            pass
        if depth > 20:
            return Unknown(ast.unparse(node), node.lineno)
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.value(self.names[node.id], depth + 1)
        if isinstance(node, ast.List | ast.Tuple):
            items = [self.value(item, depth + 1) for item in node.elts]
            return items if not any(isinstance(item, Unknown) for item in items) else _unknown(node)
        if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
            keys = [self.value(key, depth + 1) for key in node.keys]
            values = [self.value(value, depth + 1) for value in node.values]
            if not any(isinstance(item, Unknown) for item in [*keys, *values]):
                return dict(zip(keys, values, strict=True))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return node.attr  # torch.bfloat16
        return _unknown(node)

    def keywords(self, call: ast.Call, first: str) -> dict[str, ast.expr]:
        """Return the keyword arguments of a call, those of `**{...}` too. `first`: name of a positional one."""
        found = {first: call.args[0]} if call.args else {}
        for keyword in call.keywords:
            if keyword.arg is not None:
                found[keyword.arg] = keyword.value
                continue
            node: ast.expr | None = keyword.value
            while isinstance(node, ast.Name):
                node = self.names.get(node.id)
            if isinstance(node, ast.Call) and called(node) == "dict":
                found |= {inner.arg: inner.value for inner in node.keywords if inner.arg is not None}
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant):
                        found[str(key.value)] = value
            else:
                self.remarks.append(f"line {call.lineno}: **{ast.unparse(keyword.value)} cannot be read")
        return found


def _unknown(node: ast.expr) -> Unknown:
    return Unknown(ast.unparse(node), node.lineno)


def called(node: ast.AST) -> str | None:
    """Return the name of what a call calls: GRPOConfig for GRPOConfig(...) and trl.GRPOConfig(...)."""
    if not isinstance(node, ast.Call):
        return None
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)


def read_script(source: str, name: str = "script.py") -> Script:
    """Read a script.

    Raises:
        ConfigError: It is no Python, or makes no GRPOTrainer.
    """
    try:
        tree = ast.parse(source, name)
    except SyntaxError as error:
        raise ConfigError(f"{name}, line {error.lineno}: this is not valid Python: {error.msg}") from error
    script = Script(tree=tree, source=source)
    bound: dict[str, list[ast.expr | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        bound.setdefault(part.id, []).append(node.value if part is target else None)
        elif isinstance(node, ast.AnnAssign | ast.AugAssign) and isinstance(node.target, ast.Name):
            bound.setdefault(node.target.id, []).append(node.value if isinstance(node, ast.AnnAssign) else None)
    script.names = {key: values[0] for key, values in bound.items() if len(values) == 1 and values[0] is not None}
    script.functions = {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    calls = {kind: [node for node in ast.walk(tree) if called(node) in kind] for kind in (CONFIGS, TRAINERS, PARSERS)}
    if not calls[TRAINERS]:
        raise ConfigError(f"{name}: it makes no GRPOTrainer(...), so there is nothing to migrate")
    if len(calls[TRAINERS]) > 1:
        script.remarks.append(f"it makes {len(calls[TRAINERS])} GRPOTrainers: the first one is migrated")
    trainer = calls[TRAINERS][0]
    assert isinstance(trainer, ast.Call)
    script.trainer = script.keywords(trainer, "model")
    for config in calls[CONFIGS][:1]:
        assert isinstance(config, ast.Call)
        read = script.keywords(config, "output_dir")
        script.config = {key: script.value(value) for key, value in read.items()}
    if not calls[CONFIGS] and calls[PARSERS]:
        script.parser = called(calls[PARSERS][0])
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) == "LoraConfig":
            script.peft = {key: script.value(value) for key, value in script.keywords(node, "task_type").items()}
    _read_assigned_fields(script)
    return script


def _read_assigned_fields(script: Script) -> None:
    """Read `args.beta = 0.1` below the config."""
    given = script.trainer.get("args")
    if not isinstance(given, ast.Name):
        return
    for node in ast.walk(script.tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Attribute) and getattr(target.value, "id", None) == given.id:
                    script.config[target.attr] = script.value(node.value)
