"""The public API: names, laziness, types."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import grpo

PACKAGE = Path(grpo.__file__).parent
HEAVY = ["torch", "transformers", "accelerate", "numpy", "yaml"]


def imported_after(code: str) -> set[str]:
    """Return the modules of HEAVY that a fresh process has imported after `code`."""
    program = f"import sys\n{code}\nimport json; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_import_loads_no_library() -> None:
    assert imported_after("import grpo; dir(grpo)") == set()


def test_the_config_and_rewards_load_no_torch() -> None:
    assert "torch" not in imported_after("from grpo import Config, load_config, register_reward, register_dataset")


def test_the_command_line_loads_no_torch() -> None:
    assert imported_after("import grpo.cli; assert 'train' in grpo.cli.help_text()") == set()


@pytest.mark.parametrize("name", grpo.__all__)
def test_each_name_is_what_its_module_defines(name: str) -> None:
    value = getattr(grpo, name)
    module = importlib.import_module(grpo._PUBLIC[name])
    assert value is getattr(module, name) and callable(value)
    assert name in dir(grpo)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'grpo' has no attribute 'nothing'"):
        grpo.nothing  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    assert (PACKAGE / "py.typed").is_file()
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname: node.module for node in imports for alias in node.names} == grpo._PUBLIC
