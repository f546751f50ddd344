"""The number of processes that a launch requested."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from grpo.runtime.launch import requested_processes


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["python", "-m", "accelerate.commands.launch", "--num_processes", "3", "train.py"], 3),
        (["python", "accelerate", "launch", "--num-processes=4", "train.py"], 4),
        (["python", "accelerate", "launch", "--config_file", "FILE", "train.py", "--num_processes", "9"], 2),
        (["python", "accelerate", "launch", "train.py", "--num_processes", "9"], 1),
        (["bash"], 1),
    ],
)
def test_the_launchers_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], expected: int
) -> None:
    config = tmp_path / "two.yaml"
    config.write_text("num_processes: 2\n")
    words = [str(config) if word == "FILE" else word for word in command]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(psutil, "Process", lambda number: SimpleNamespace(cmdline=lambda: words))
    assert requested_processes() == expected


def test_the_environment_of_a_rank_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert requested_processes() == 5
