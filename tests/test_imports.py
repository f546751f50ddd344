"""Imports point down only, none is circular, and no optional library is needed to import the trainer."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTIONAL = ["wandb", "tensorboard", "trackio", "peft", "vllm", "deepspeed", "gradio", "trl"]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "grpo").rglob("*.py"))
}
READING_PATH = [
    *("trainer.py", "experience.py", "advantages.py", "losses.py", "kl.py"),
    *("packing.py", "policy.py", "logprobs.py", "types.py"),
]
"""The loose files of grpo/ that are GRPO itself, in the order in which README lists them."""
MAX_LINES = 1500
OTHER_FILES = {"__init__.py", "cli.py", "errors.py", "registry.py"}


def imports_of(name: str) -> set[str]:
    """Return the modules of this package that a module imports: at the top, lazily, or for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in MODULES else str(node.module) for part in parts}
    return {module for module in found if module in MODULES and module != name}


def test_no_import_is_circular() -> None:
    graph = {name: imports_of(name) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circular import: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_layers() -> None:
    """The contracts in pyproject.toml, as `lint-imports` checks them."""
    pytest.importorskip("importlinter", reason='pip install -e ".[test]"')
    result = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_loose_files_are_the_reading_path() -> None:
    loose = {path.name for path in (ROOT / "grpo").glob("*.py")}
    assert set(READING_PATH) <= loose <= set(READING_PATH) | OTHER_FILES
    lines = {name: sum(map(bool, map(str.strip, (ROOT / "grpo" / name).open()))) for name in READING_PATH}
    assert sum(lines.values()) <= MAX_LINES, lines
    listed = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Read this first")[2].split("```")[1]
    assert re.findall(r"^grpo/(\S+)", listed, re.MULTILINE) == READING_PATH


def test_packages_hold_no_code() -> None:
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name != "grpo":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert all(isinstance(node, ast.Expr) for node in body), f"{path}: only a docstring belongs here"


@pytest.mark.slow
def test_everything_imports_without_the_optional_libraries() -> None:
    # A module that is None in sys.modules raises ImportError, as if it were not installed.
    program = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
        f"for name in {list(MODULES)!r}:\n"
        "    importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
