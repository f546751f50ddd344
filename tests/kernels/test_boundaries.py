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


DEVICE_ERRORS = {"raise_device_error", "is_fatal", "is_out_of_memory", "survives"}
"""Functions that let a handler tell a lack of memory and a failed device from an operation that is not there."""
NO_DEVICE = {
    "rollout/vllm_client.py": 1,  # opens a port
    "runtime/storage.py": 2,  # looks for the home folder
    "models/loading.py": 1,  # raises whatever is not about shapes
}
"""Number of handlers of RuntimeError in files that catch it for another reason."""


def test_no_handler_of_runtime_errors_hides_a_failed_device() -> None:
    """torch.OutOfMemoryError and the errors of CUDA are RuntimeErrors. Code that tries something else must ask."""
    unsure: dict[str, int] = {}
    for path in GRPO.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and "RuntimeError" in ast.unparse(node.type or ast.Constant("")):
                called = {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node)}
                if not called & DEVICE_ERRORS:
                    name = path.relative_to(GRPO).as_posix()
                    unsure[name] = unsure.get(name, 0) + 1
    assert unsure == NO_DEVICE
