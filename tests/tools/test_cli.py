"""One command line: `grpo NAME`, the scripts in launch/ and the functions of grpo/tools are the same code."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo import cli
from grpo.errors import ConfigError

ROOT = Path(__file__).parents[2]
LAUNCH = {path.stem: path for path in (ROOT / "launch").glob("*.py") if path.stem != "benchmark"}


def test_every_command_has_a_launch_script_of_a_few_lines() -> None:
    assert set(LAUNCH) == set(cli.COMMANDS)
    for name, path in LAUNCH.items():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
        assert lines[-1] == f'    run("{name}")' and len(lines) <= 8, path


def test_scripts_hide_no_library(tmp_path: Path) -> None:
    """`import evaluate` in a reward is the library, not launch/evaluate.py."""
    (tmp_path / "evaluate.py").write_text("name = 'the library'\n")
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); sys.argv[1:] = ['--help']\n"
        "import grpo.cli\n"
        "grpo.cli.main = lambda words: print(__import__('evaluate').name)\n"
        "grpo.cli.run('train')\n"
    )
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    words = [sys.executable, "-c", program, str(ROOT / "launch")]
    shown = subprocess.run(words, cwd=tmp_path / "..", env=variables, capture_output=True, text=True, check=True)
    assert shown.stdout == "the library\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    shown = capsys.readouterr().out
    for name, (module, text) in cli.COMMANDS.items():
        assert f"  {name}" in shown and text in shown
        assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_an_unknown_command_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown command 'evalute': did you mean 'evaluate'\? Known: train, check"):
        cli.main(["evalute"])
    with pytest.raises(ConfigError, match="no command given: Known: train"):
        cli.main([])


@pytest.mark.parametrize(
    "words",
    [
        ["launch/train.py", "--stepps=3"],
        ["-m", "grpo.cli", "train", "--stepps=3"],
        ["launch/check.py", "--stepps=3"],
        ["-m", "grpo.cli", "memory", "--stepps=3"],
    ],
)
def test_a_config_error_is_exit_code_2_on_every_way(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown flag --stepps (value '3'): did you mean 'steps'?\n"
