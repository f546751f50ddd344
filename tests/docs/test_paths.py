"""Every module name and every path in code, tests, docs and settings exists."""

import importlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tomllib

from grpo.runtime import env

ROOT = Path(__file__).parents[2]
FOLDERS = "grpo|launch|benchmarks|tests|docs|accelerate_configs|notebooks|\\.ci"
SUFFIXES = "py|pyi|yaml|c|h|cu|md|json|css|js|ipynb|png|sh|txt"
PATH = re.compile(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]*\.(?:{SUFFIXES}))\b")
DOTTED = re.compile(r"(?<![\w./@-])grpo(?:\.[A-Za-z_]\w*)+")
UNCHECKED = {"CHANGELOG.md", "docs/comparison.md", "docs/results/peers.json"}
"""History, and paths in other projects."""
MISSING = {"grpo.nothing", "grpo.compat", "grpo.somewhere", "grpo.x"}
"""A name that a test expects to be missing, an optional layer of the import contract, and loggers of tests."""


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> dict[str, str]:
    found = {}
    for path in tracked():
        name = str(path.relative_to(ROOT))
        if name not in UNCHECKED and not name.startswith("tests/fixtures/") and path.suffix not in (".png", ".lock"):
            found[name] = path.read_text(encoding="utf-8")
    return found


def resolve(name: str) -> Any:
    """Import the longest module prefix of `name`, and look up the rest as attributes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        place = ROOT.joinpath(*parts[:count])
        if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
            value = importlib.import_module(module)
            for part in parts[count:]:
                value = getattr(value, part)
            return value
    raise AttributeError(name)


def test_every_dotted_name_resolves() -> None:
    where: dict[str, str] = {}
    for file, text in texts().items():
        for name in DOTTED.findall(text):
            where.setdefault(name, file)
    assert len(where) > 100
    broken = []
    for name in sorted(set(where) - MISSING):
        try:
            resolve(name)
        except (AttributeError, ImportError) as error:
            broken.append(f"{where[name]}: {name} ({error!r})")
    assert broken == []


def test_every_path_exists() -> None:
    found = {(file, path) for file, text in texts().items() for path in PATH.findall(text)}
    assert len(found) > 200
    missing = sorted(f"{file}: {path}" for file, path in found if not (ROOT / path).exists())
    assert [line for line in missing if not re.search(r"/[A-Z]+\.\w+$", line)] == []  # X.yaml: a placeholder


def test_package_data_and_console_scripts() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["grpo"]
    shipped = {path for pattern in patterns for path in (ROOT / "grpo").glob(pattern)}
    assert [pattern for pattern in patterns if not list((ROOT / "grpo").glob(pattern))] == []
    package = {path for path in tracked() if path.is_relative_to(ROOT / "grpo")}
    assert sorted(path.name for path in package - shipped if path.suffix not in (".py", ".md")) == []
    for target in settings["project"]["scripts"].values():
        assert callable(resolve(target.replace(":", ".")))


def test_the_env_file_is_looked_up_in_the_checkout() -> None:
    assert env.source_checkout() == ROOT and (ROOT / ".env.example").is_file()


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")
def test_a_changed_header_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's name depends on all C files beside its source, so a stale library is never loaded."""
    folder = tmp_path / "cpu"
    shutil.copytree(ROOT / "grpo" / "kernels" / "cpu", folder)
    spec = importlib.util.spec_from_file_location("copied_compiler", folder / "compiler.py")
    assert spec is not None and spec.loader is not None
    compiler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiler)
    names: list[str] = []
    monkeypatch.setattr(compiler, "_compile", lambda command, source, library: names.append(library.name))
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", "cc")
    header = next(folder.glob("*.h"))
    original = header.read_text()
    for text in (original, original + "\n", original):
        header.write_text(text)
        names.append("next")
        compiler.compiled.__wrapped__(folder / "kernels.c")
    first, second, third = ({*part.split()} for part in " ".join(names).split("next")[1:])
    assert first == third != second and len(first) == 1


@pytest.mark.parametrize("source", sorted((ROOT / "grpo").rglob("*.[ch]")), ids=lambda path: path.name)
def test_c_includes_lie_beside_their_source(source: Path) -> None:
    for name in re.findall(r'^#include "(.+)"', source.read_text(encoding="utf-8"), re.MULTILINE):
        assert (source.parent / name).is_file(), f"{source.name} includes {name}"


def test_every_test_that_a_page_names_is_there() -> None:
    """`tests/FILE.py::NAME`, as in docs/data_habits.md, whose first column counts from 1 to 26 without a gap."""
    named = {
        (name, file, test)
        for name, text in texts().items()
        if name.endswith(".md")
        for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    }
    assert len(named) > 50
    for page, file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page}: {file}::{test}"
    numbers = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "data_habits.md").read_text(), re.MULTILINE)
    assert sorted(set(map(int, numbers))) == list(range(1, 27))
