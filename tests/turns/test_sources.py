"""Files of tools and environments: recorded as loaded, and an edited one is found."""

from hashlib import sha256
from pathlib import Path

import pytest

from grpo.config.schema import Config
from grpo.errors import EngineError
from grpo.rewards.sources import changed_sources
from grpo.turns.calls import Call
from grpo.turns.sources import turn_sources
from grpo.turns.tools import find_tools
from grpo.turns.workers import TurnWorkers

TOOL = '''
from MODULE import LIMIT

def limit(name: str) -> int:
    """Look up a limit.

    Args:
        name: Of what.
    """
    return LIMIT
'''
GAME = """
class Game:
    def reset(self, prompt):
        return None

    def step(self, completion):
        return [], 1.0, True
"""


def write(folder: Path, module: str) -> list[str]:
    """Write the files and return the names of the tool, which imports a module beside it, and of the environment."""
    (folder / "tool.py").write_text(TOOL.replace("MODULE", module))
    (folder / f"{module}.py").write_text("LIMIT = 7\n")
    (folder / "game.py").write_text(GAME)
    return [f"{folder}/tool.py:limit", f"{folder}/game.py:Game"]


def test_files_of_tools_and_environments_are_recorded(tmp_path: Path) -> None:
    tool, game = write(tmp_path, "limits_a")
    files = {name: sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("tool.py", "limits_a.py", "game.py")}
    with_tools, with_game = Config(tools=["calculator", tool]), Config(environment=game)
    before = turn_sources(with_tools)
    assert before == {
        tool: {
            "file": str(tmp_path / "tool.py"),
            "sha256": files["tool.py"],
            "imports": {str(tmp_path / "limits_a.py"): files["limits_a.py"]},
            "key": "tools",
        }
    }
    assert turn_sources(with_game) == {
        game: {"file": str(tmp_path / "game.py"), "sha256": files["game.py"], "key": "environment"}
    }
    (tmp_path / "limits_a.py").write_text("LIMIT = 8\n")
    [line] = changed_sources(before, turn_sources(with_tools))["tools"]
    start = f"tool '{tool}' has changed since the checkpoint was written ({tmp_path / 'limits_a.py'}, sha256 "
    assert line.startswith(start)
    assert changed_sources(before, before) == {} == turn_sources(Config())


def test_a_tool_that_changes_during_the_run_is_refused(tmp_path: Path) -> None:
    tool, _ = write(tmp_path, "limits_b")
    pool = TurnWorkers(find_tools([tool]), workers=1)
    (tmp_path / "limits_b.py").write_text("LIMIT = 8\n")  # before its process starts
    try:
        with pytest.raises(EngineError, match=r"tools: .*limits_b.py was changed during the run .*\[tools\]"):
            pool.call([Call("limit", {"name": "x"})]).result()
    finally:
        pool.close()
