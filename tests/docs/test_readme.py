"""README: every bash block runs, and every file named in it or in a page for beginners exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
NAMES = ["quickstart", "data", "rewards", "metrics", "errors"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]


def test_the_two_commands_are_one_line_each() -> None:
    launch = "accelerate launch --quiet --config_file accelerate_configs/one_process.yaml launch/train.py"
    assert BLOCKS[0] == f"pip install -r requirements.txt && {launch}\n"
    assert BLOCKS[1] == 'pip install -r requirements.txt && pip install -e ".[test]" && pytest\n'


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_are_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target
    for name in re.findall(r"\b(?:launch|accelerate_configs|grpo|tests)/[\w./]+\.(?:py|yaml)\b", text):
        assert (ROOT / name).exists(), name


def test_every_key_in_the_tables_is_there() -> None:
    from grpo.config.schema import Config, flatten, to_dict

    keys = flatten(to_dict(Config()))
    table = README.partition("## Coming from TRL or verl")[2].partition("\n## ")[0]
    for line in table.splitlines():
        first = line.partition("|")[2].partition("|")[0]
        for key in re.findall(r"`([a-z_.]+)[^`]*`", first):
            assert key in keys or any(known.endswith("." + key) for known in keys), key


def shortened(block: str) -> str:
    """Return a short form of the block: nothing is installed, two training steps, tests are only collected."""
    lines = []
    for line in block.splitlines():
        line = re.sub(r"pip install (-r \S+|-e \S+) && ", "", line)
        line = re.sub(r"launch/train\.py", "launch/train.py --steps 2 --data.eval_size 8 --tracking.report_to=[]", line)
        line = re.sub(r"^pytest$", f"pytest --collect-only -q -p no:cacheprovider {shlex.quote(str(ROOT))}", line)
        line = line.replace("launch/evaluate.py", "launch/evaluate.py --data.eval_size 8")
        lines.append(line)
    return "\n".join(lines) + "\n"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_bash_block_runs(tmp_path: Path) -> None:
    """Run all blocks in one folder, in the order of the page."""
    for name in ("launch", "accelerate_configs", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for code in re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        (tmp_path / code.partition("\n")[0].removeprefix("# ")).write_text(code)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    printed = ""
    for block in BLOCKS:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", shortened(block)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        printed += done.stdout
    assert "ready to train" in printed and "McNemar's exact test" in printed and "trained: " in printed
    assert (tmp_path / "outputs" / "first" / "report.md").is_file()
