"""The feedback cycle on an invented language: right corrections promoted, wrong ones rejected, withdrawals."""

import json
from pathlib import Path

import pytest

from grpo.data.card import publishable
from grpo.errors import ConfigError
from grpo.tools.community import command, cycle
from grpo.tools.community.feedback import new_feedback
from grpo.tools.community.gate import current
from grpo.tools.community.merge import merge, read_rows_of, write_version


def run(*arguments: object) -> None:
    command.main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_two_hundred_corrections_are_promoted_and_a_poisoned_batch_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "root"
    run("demo", "--root", root, "--poison")
    honest, poisoned = (json.loads((root / f"gate-{number}.json").read_text()) for number in (1, 2))

    assert honest["promote"] and not honest["reasons"]
    assert honest["feedback"]["new"] - honest["feedback"]["old"] >= 0.3  # corrected, and not trained on
    assert honest["regression"]["old"] - honest["regression"]["new"] <= 0.01  # untouched
    assert honest["regression"]["old"] > 0.9  # it had something to lose

    assert not poisoned["promote"] and "regression set may have fallen" in poisoned["reasons"][0]
    assert poisoned["feedback"]["new"] > poisoned["feedback"]["old"]  # feedback alone would have let it through
    used = current(root)
    assert used is not None and used["model"] == honest["new"] == poisoned["old"]

    versions = root / "versions"
    assert read_rows_of(versions / "v4") == read_rows_of(versions / "v2")  # the poisoner withdrew
    with pytest.raises(ConfigError, match="withdrawn"):
        read_rows_of(versions / "v3")
    assert "magpie" not in "".join(path.read_text() for path in versions.rglob("*.json*"))
    assert publishable(root / "candidates" / "v2")["permission"] == "granted"


def archive(root: Path, permission: str) -> None:
    rows = [{"question": f"say {name}", "answer": f"`{name}`", "pair_id": name} for name in ("a", "b")]
    root.mkdir()
    (root / "archive.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "archive.jsonl.card.yaml").write_text(f"source: us\nlicence: ours\npermission: {permission}\n")


def test_merging_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    archive(root, "prohibited")
    with pytest.raises(ConfigError, match="holds no version yet: give --base"):
        run("merge", "--root", root)
    said = ("--prompt", "say a", "--completion", "`a`", "--correction", "`â`", "--reviewer", "heron", "--consent")
    run("collect", "--root", root, "--verdict", "correct", "--pair_id", "a", *said)
    run("merge", "--root", root, "--base", root / "archive.jsonl")
    assert [row["answer"] for row in read_rows_of(root / "versions" / "v2")] == ["`â`", "`b`"]
    capsys.readouterr()
    run("merge", "--root", root)
    assert "nothing has changed" in capsys.readouterr().out
    run("collect", "--root", root, "--export", root / "records.json")
    assert json.loads((root / "records.json").read_text())[0]["responses"]["correction"] == "`â`"
    # The card came along, and is asked before anything is trained.
    with pytest.raises(ConfigError, match="permission is prohibited"):
        run("train", "--root", root, "--model", "none", "--output", root / "candidate")
    with pytest.raises(ConfigError, match=r"names no model in use yet: give --model"):
        run("cycle", "--root", root, "--regression", root / "archive.jsonl")


def test_what_still_holds_a_word_that_was_corrected_away_is_contested(tmp_path: Path) -> None:
    rows = [
        {"question": "stone?", "answer": "stone is tâga. It is `tâga`.", "pair_id": 1},
        {"question": "my stone?", "answer": "my is mî-, stone is tâga. It is `mîtâga`.", "pair_id": 2},
        {"question": "my river?", "answer": "my is mî-, river is ẖôni. It is `mîẖôni`.", "pair_id": 3},
    ]
    said = new_feedback(
        "correct",
        prompt="stone?",
        completion=rows[0]["answer"],
        correction="stone is tâge. It is `tâge`.",
        pair_id=1,
        consent=True,
    )
    version, _ = write_version(tmp_path, merge(rows, [said]))
    corrected, held_back, before = cycle.split_rows(version)
    assert [row["pair_id"] for row in corrected + held_back] == [1]
    assert [row["pair_id"] for row in before] == [3]  # 2 would teach tâga again
