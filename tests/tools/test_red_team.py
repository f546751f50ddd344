"""The red team finds planted faults, pays attention to the sum, and leaves sound rewards alone."""

from pathlib import Path

import pytest

from grpo.config.schema import DataConfig
from grpo.data.rows import Example, load_examples
from grpo.data.tokenizer import load_tokenizer
from grpo.rewards.scoring import RewardSum
from grpo.tools import red_team
from grpo.tools.check_result import RedTeam
from grpo.tools.red_team import search
from grpo.tools.red_team_attacks import Task, near_misses, wrong_texts
from tests.fakes import save_tokenizer

PLANTED = Path(__file__).parents[2] / "benchmarks" / "planted_rewards.py"
FORM = "xml"


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return load_examples(DataConfig(name="arithmetic"), "train", 0)[:40]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(red_team, "ROWS", 2)
    save_tokenizer(tmp_path)
    return tmp_path


def attacked(folder: Path, rows: list[Example], **rewards: float) -> RedTeam:
    known = {"accuracy", "xml_format"}
    named = {name if name in known else f"{PLANTED}:{name}": weight for name, weight in rewards.items()}
    return search(RewardSum(named, {}), rows, load_tokenizer(str(folder)), FORM)


def test_a_pattern_without_anchors_pays_the_list_of_all_numbers(folder: Path, rows: list[Example]) -> None:
    found = attacked(folder, rows, no_anchor=1.0)
    earned = {attempt.name: attempt.total for attempt in found.attempts}
    assert earned["every number from 0 to 100 as the answer"] == earned["a digit after"] == 1.0
    assert earned["another row's answer"] == earned["nothing"] == 0.0
    assert found.right is not None and found.right.total == 1.0
    assert len(found.problems) == 1 and "a right answer 1.000" in found.problems[0]


def test_a_count_of_tags_beats_a_right_answer_by_repeating(folder: Path, rows: list[Example]) -> None:
    found = attacked(folder, rows, accuracy=1.0, tag_count=1.0)
    assert found.right is not None and found.right.total == 2.25  # accuracy 1, tag_count 0.25 + 1
    best = found.attempts[0]
    assert best.name.startswith("every number, each as an answer, 30 times") and best.total == 0.25 * 101 * 30
    assert any("tag_count" in warning for warning in found.warnings)
    assert not any("'accuracy'" in warning for warning in found.warnings)


def test_sound_rewards_have_no_finding(folder: Path, rows: list[Example]) -> None:
    found = attacked(folder, rows, accuracy=1.0, xml_format=0.2)
    assert found.problems == found.warnings == []
    assert found.right is not None and found.right.total == pytest.approx(1.2)
    assert found.attempts[0].total == pytest.approx(0.2)  # the form alone


def test_attacks_are_wrong_answers() -> None:
    task = Task("How many?", "5", "7", "2+3=5", "3+4=7", "")
    answers = wrong_texts(task, lambda work, answer: answer)
    assert "5" not in answers.values() and answers["a digit after"] == "51" and answers["the other sign"] == "-5"
    assert near_misses("0").keys().isdisjoint({"the other sign", "ten times"})  # they are 0
    assert near_misses("Paris")["the first letter of the gold answer"] == "P"
