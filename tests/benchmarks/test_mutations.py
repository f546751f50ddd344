"""Mutations: the list fits the code, a fault is noticed, and the page shows the stored results."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.mutations import PAGE, applies, mutations, page
from benchmarks.shared import RESULTS, read_json

ROOT = Path(__file__).parents[2]


def test_the_list_fits_the_code() -> None:
    """A change of the code may outdate a few entries, which then are to be updated: python benchmarks/mutations.py."""
    found = mutations()
    assert len(found) >= 80 and max(Counter((one.file, one.name) for one in found).values()) == 1
    texts = {one.file: (ROOT / one.file).read_text(encoding="utf-8") for one in found}
    stale = [f"{one.file}: {one.name}" for one in found if not applies(one, texts[one.file])]
    assert len(stale) <= 0.1 * len(found), stale


def test_the_page_is_made_of_the_stored_results() -> None:
    report = read_json(RESULTS / "mutations.json")
    assert PAGE.read_text(encoding="utf-8") == page(report), "run: python benchmarks/mutations.py --page"
    verdicts = Counter(row["verdict"] for row in report["mutations"])
    assert verdicts["killed"] >= 0.95 * (verdicts["killed"] + verdicts["survived"])
    assert all(row["reason"] for row in report["mutations"] if row["verdict"] == "equivalent")


@pytest.mark.slow
def test_a_fault_is_noticed_and_the_file_restored() -> None:
    """In a new process: the operators of the package cannot be registered again for the copy's."""
    code = """
from benchmarks.mutations import Mutation, copied_tree, judge
wrong = Mutation("half", "grpo/kl.py", "log_ratio**2 / 2", "log_ratio**2", "tests/test_losses.py -k estimators")
harmless = Mutation("same", "grpo/kl.py", "log_ratio**2 / 2", "log_ratio**2 * 0.5", wrong.tests)
with copied_tree() as tree:
    before = (tree / wrong.file).read_text()
    print(*[judge(tree, one, 300).verdict for one in (wrong, harmless)])
    print((tree / wrong.file).read_text() == before)
"""
    variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.stdout.split() == ["killed", "survived", "True"], done.stderr
