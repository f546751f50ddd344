"""Device-specific code is in grpo/kernels and grpo/runtime/device.py alone; kernels import torch and types."""

import ast
import re
from pathlib import Path

import pytest

GRPO = Path(__file__).parents[2] / "grpo"
DEVICE_TESTS = re.compile(
    r"\.is_cpu\b|\.is_cuda\b|\.is_mps\b|\bdevice\.type\s*[!=]=|\bdevice_type\s*[!=]=|mkldnn|onednn|\btorch\.cuda\b|\btorch\.mps\b"
    r"|grpo\.kernels\.cpu\.compiler"
)
ALLOWED = {
    "rollout/vllm_worker.py": 2,  # asks vLLM which platform it runs on
}
"""Lines in files that ask another library about its device."""


def lines_of(path: Path) -> list[str]:
    """Return the code of a file without docstrings and comments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ] or [ast.Pass()]
    return ast.unparse(tree).splitlines()


def test_no_device_is_asked_for_outside_of_kernels() -> None:
    found = {}
    for path in GRPO.rglob("*.py"):
        name = path.relative_to(GRPO).as_posix()
        if not name.startswith("kernels/") and name != "runtime/device.py":
            lines = [line.strip() for line in lines_of(path) if DEVICE_TESTS.search(line)]
            if len(lines) > ALLOWED.get(name, 0):
                found[name] = lines
    assert not found


@pytest.mark.parametrize("path", sorted((GRPO / "kernels").rglob("*.py")), ids=lambda path: path.stem)
def test_kernels_are_pure(path: Path) -> None:
    """Kernels know no config. `grpo.runtime.storage` imports only the standard library."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
        elif isinstance(node, ast.Import):
            modules += [name.name for name in node.names]
    own = [module for module in modules if module.startswith("grpo.")]
    assert all(
        module.startswith(("grpo.kernels", "grpo.errors", "grpo.types", "grpo.runtime.storage")) for module in own
    )
    assert not any(module.split(".")[0] in ("transformers", "accelerate", "peft") for module in modules)
