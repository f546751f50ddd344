"""README's first picture, its caption and its example, and the table of quickstart are those of the stored results."""

from pathlib import Path

from benchmarks.shared import read_json
from benchmarks.starter_seeds import PICTURE, STORED, digest, draw, remark, results_of, table
from grpo.data.generated import is_held_out

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
REPORT = read_json(STORED)
RUNS = REPORT["runs"]


def test_the_picture_was_drawn_from_the_stored_results(tmp_path: Path) -> None:
    assert results_of(PICTURE) == digest(STORED)
    draw(RUNS[:1], tmp_path / "a.png", "other results")
    assert results_of(tmp_path / "a.png") == "other results"


def test_the_caption_tells_what_the_results_say() -> None:
    before = [100 * run["accuracy_by_step"]["0"] for run in RUNS]
    assert f"{min(before):.0f} to {max(before):.0f} % of {REPORT['held_out_problems']} held-out" in " ".join(
        README.split()
    )
    assert all(run["accuracy_by_step"]["30"] == 1.0 for run in RUNS) and len(RUNS) == 5
    quickstart = (ROOT / "docs" / "quickstart.md").read_text()
    assert "\n".join(table(RUNS)) in quickstart
    assert remark(RUNS) in " ".join(quickstart.split())


def test_the_example_is_a_held_out_question_that_training_made_right() -> None:
    """The question of the chat command, too."""
    example = RUNS[0]["example"]
    assert is_held_out(example["question"]) and example["question"].count(".") == 5
    for text in example.values():
        assert " ".join(text.split()) in README
    assert f'--ask "{example["question"]}"' in README
