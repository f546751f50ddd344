"""docs/api.md: its examples run as one script, and its table lists the public names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grpo
from tests.fakes import tiny_folder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_table_lists_every_public_name() -> None:
    listed = re.findall(r"^\| `(\w+)", PAGE, re.MULTILINE)
    assert sorted(listed) == sorted(grpo.__all__)


def run_examples(folder: Path, *examples: str) -> None:
    (folder / "script.py").write_text("\n".join(examples), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_the_examples_run_on_a_tiny_random_model(tmp_path: Path) -> None:
    """Run the whole script with a model that needs no warm-up."""
    tiny_folder(tmp_path / "model")
    changes = [
        f"config.model.name = {str(tmp_path / 'model')!r}",
        "config.sampling.max_completion_length, config.sampling.num_generations, config.prompts_per_step = 8, 4, 2",
        "config.data.system_prompt = None",
    ]
    run_examples(tmp_path, EXAMPLES[0], *changes, *EXAMPLES[1:])
    assert (tmp_path / "outputs" / "api" / "report.md").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_examples_run_as_they_stand(tmp_path: Path) -> None:
    run_examples(tmp_path, *EXAMPLES)
