"""Imports point down only, and no optional library is needed to import the trainer."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTIONAL = ["wandb", "tensorboard", "trackio", "peft", "vllm", "deepspeed", "gradio", "trl"]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "grpo").rglob("*.py")
)


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


def test_everything_imports_without_the_optional_libraries() -> None:
    # A module that is None in sys.modules raises ImportError, as if it were not installed.
    program = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
        f"for name in {MODULES!r}:\n"
        "    importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
