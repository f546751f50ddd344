"""The built wheel, installed alone: the command line and the package's data are complete without a checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tracked files."""
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs pip and setuptools")
    folder = tmp_path_factory.mktemp("build")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    for name in names.stdout.split("\0"):
        if name and (ROOT / name).is_file() and name.startswith(("grpo/", "README", "pyproject", "LICENSE")):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", folder, folder / "source"], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel; libraries come from this environment's folder, by a path file."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # Path files inside a folder that a path file names are not read: an editable install there stays without effect.
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (Path(own) / "libraries.pth").write_text("\n".join(paths) + "\n")
    return folder


def run(environment: Path, folder: Path, *words: object) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(environment / "bin" / str(words[0])), *map(str, words[1:])]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    names = subprocess.run(["git", "ls-files", "-z", "grpo"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {
        name for name in names.stdout.split("\0") if name and not name.endswith(".md") and (ROOT / name).is_file()
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("grpo/")}
    assert tracked - packed == set() and packed - tracked == set()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the environment's layout is POSIX")
@pytest.mark.timeout(900)
def test_the_wheel_alone_runs(environment: Path, tmp_path: Path) -> None:
    place = run(environment, tmp_path, "python", "-c", "import grpo; print(grpo.__file__)")
    assert Path(place.stdout.strip()).is_relative_to(environment), place.stderr
    helped = run(environment, tmp_path, "grpo", "train", "--help")
    assert helped.returncode == 0 and "sampling.num_generations" in helped.stdout, helped.stderr
    wrong = run(environment, tmp_path, "grpo", "train", "--stepps=3")
    assert wrong.returncode == 2 and "did you mean 'steps'" in wrong.stderr
    checked = run(environment, tmp_path, "grpo", "check", f"--run_dir={tmp_path / 'run'}")
    assert checked.returncode == 0 and "ready to train" in checked.stdout, checked.stderr
