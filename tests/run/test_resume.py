"""Resume: exact at every step; changes of config and code are reported."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grpo.config.schema import Config, flatten, to_dict
from grpo.errors import ConfigError, StorageError
from grpo.rewards.scoring import RewardSum
from grpo.rewards.sources import changed_sources, reward_sources
from grpo.run.checkpoint import save_checkpoint
from grpo.run.checkpointer import find_checkpoint
from grpo.run.resume import check_changes, class_of
from tests.runtime.test_signals import rows_of
from tests.test_trainer import run

STEPS = 4
COSINE = {"steps": STEPS, "optimizer.lr_scheduler_type": "cosine", "optimizer.warmup_ratio": 0.3}
LORA = {"lora.r": 4, "optimizer.learning_rate": 0.01}


def stopped_at(folder: Path, name: str, stop: int) -> None:
    """A copy of the run "whole" as a run that ended after step `stop` would have left it, with records of later steps:
    those that were written after the last checkpoint."""
    shutil.copytree(folder / "whole", folder / name)
    for later in range(stop + 1, STEPS + 1):
        shutil.rmtree(folder / name / "checkpoints" / f"step-{later}")
    shutil.rmtree(folder / name / "final")


def checkpoints_equal(one: Path, other: Path, step: int = STEPS) -> bool:
    """Weights, moments, schedule and sampler position are equal to the bit."""
    first, second = (folder / "checkpoints" / f"step-{step}" for folder in (one, other))
    files = sorted(path.name for path in first.glob("*.safetensors"))
    assert files == sorted(path.name for path in second.glob("*.safetensors"))
    for name in files:
        mine, theirs = load_file(first / name), load_file(second / name)
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[key], theirs[key]) for key in mine):
            return False
    states = [json.loads((path / "state.json").read_text()) for path in (first, second)]
    for state in states:
        for key in ("run_dir", "resume"):
            state["config"].pop(key)
        state.pop("last_eval")  # holds times nowhere, but the first row of a resumed run may lack it
    return states[0] == states[1]


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("extra", [{}, LORA], ids=["full", "lora"])
def test_resume_is_exact_at_every_step(
    tmp_path: Path, record_property: Any, iterations: int, extra: dict[str, Any]
) -> None:
    settings = COSINE | extra | {"objective.num_iterations": iterations}
    run(tmp_path, "whole", **settings)
    record_property("steps stopped at", STEPS - 1)
    for stop in range(1, STEPS):
        stopped_at(tmp_path, f"part-{stop}", stop)
        run(tmp_path, f"part-{stop}", resume="auto", **settings)
        assert rows_of(tmp_path / f"part-{stop}") == rows_of(tmp_path / "whole")
        assert checkpoints_equal(tmp_path / f"part-{stop}", tmp_path / "whole")
        steps = [
            json.loads(line)["step"] for line in (tmp_path / f"part-{stop}/rollouts.jsonl").read_text().splitlines()
        ]
        assert steps == [step for step in range(1, STEPS + 1) for _ in range(3 * 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumption")
    run(folder, "whole", **COSINE, eval_every=0)
    return folder


def resume(folder: Path, name: str, stop: int = 2, **changes: Any) -> list[dict[str, Any]]:
    stopped_at(folder, name, stop)
    return run(folder, name, **COSINE | {"eval_every": 0, "resume": "auto"} | changes)


def test_a_checkpoint_without_progress_goes_on_exactly(folder: Path) -> None:
    """Records of runs from before draws were counted."""
    stopped_at(folder, "old", 2)
    edit_state(folder / "old" / "checkpoints" / "step-2", lambda state: state.pop("progress"))
    run(folder, "old", **COSINE, eval_every=0, resume="auto")
    assert rows_of(folder / "old") == rows_of(folder / "whole")


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def edit_state(checkpoint: Path, change: Any) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    file = checkpoint / "state.json"
    manifest["files"]["state.json"] = {"size": file.stat().st_size, "sha256": sha256_of(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_changed_learning_rate_is_applied_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = resume(folder, "faster", **{"optimizer.learning_rate": 0.006, "tracking.project": "other"})
    before = [row["policy/learning_rate"] for row in rows_of(folder / "whole")]
    assert [row["policy/learning_rate"] for row in rows] == pytest.approx(
        [*before[:2], *(2 * rate for rate in before[2:])]
    )
    out = capsys.readouterr().out
    assert "resume: optimizer.learning_rate 0.003 -> 0.006 (from here on)" in out
    assert "resume: tracking.project GRPO-Fine-Tuning -> other (from here on)" in out


def test_what_would_be_another_run_needs_a_flag(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"num_generations 4 -> 6: that would be another run.*--allow_changes '\[samp"
    ):
        resume(folder, "wider", **{"sampling.num_generations": 6})
    rows = run(
        folder,
        "wider",
        **COSINE,
        eval_every=0,
        resume="auto",
        **{"sampling.num_generations": 6, "allow_changes": "[sampling.num_generations]"},
    )
    assert len(rows) == STEPS
    assert "resume: sampling.num_generations 4 -> 6 (allowed)" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_before_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.run.build.Policy", None)  # would be called to load a weight
    with pytest.raises(ConfigError, match=r"lora.r None -> 4: the checkpoint does not fit"):
        resume(folder, "adapter", **{"lora.r": 4, "allow_changes": "[lora.r]"})


def test_a_changed_reward_file_needs_a_flag(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = json.loads((folder / "whole" / "checkpoints" / "step-2" / "state.json").read_text())
    [name] = state["reward_sources"]
    assert state["reward_sources"][name]["file"] == str(folder / "count_a.py")
    environment = json.loads((folder / "whole" / "environment.json").read_text())
    assert environment["derived"]["reward_sources"] == state["reward_sources"]
    stopped_at(folder, "same", 2)
    run(folder, "same", **COSINE, eval_every=0, resume="auto")
    out = capsys.readouterr().out
    assert f"reward '{name}' is {folder / 'count_a.py'} (sha256 {sha256_of(folder / 'count_a.py')[:12]}" in out
    assert "has changed since the checkpoint was written" not in out
    own = {"rewards": json.dumps({f"{folder}/own.py:own": 1.0}), "eval_every": 0} | COSINE
    shas = []
    for factor, settings in (("8", {"run_dir": folder / "own", "steps": 2}), ("9", {"resume": "auto"})):
        (folder / "own.py").write_text(
            f"def own(completions, **_):\n    return [len(str(c)) / {factor} for c in completions]\n"
        )
        shas.append(sha256_of(folder / "own.py")[:12])
        if len(shas) == 2:
            message = r"own.py:own' has changed .* that would be another run.*--allow_changes '\[rewards\]'"
            with pytest.raises(ConfigError, match=message):
                run(folder, "own", **own | settings)
            settings = settings | {"allow_changes": "[rewards]"}
        run(folder, "own", **own | settings)
    out = capsys.readouterr().out
    assert f"warning: resume: reward '{folder}/own.py:own' has changed since the checkpoint was written" in out
    assert f"sha256 {shas[0]} -> {shas[1]}" in out and shas[0] != shas[1]


def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    folder: Path, capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    """Each file of a checkpoint, truncated or with one flipped bit."""
    names = sorted(path.name for path in (folder / "whole/checkpoints/step-3").iterdir())
    assert names == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    from grpo.run.checkpoint import newest_valid

    for name in names:
        for damage in ("cut", "flip"):
            shutil.copytree(folder / "whole" / "checkpoints", folder / "damaged" / "checkpoints", dirs_exist_ok=True)
            file = folder / "damaged" / "checkpoints" / f"step-{STEPS}" / name
            content = file.read_bytes()
            middle = len(content) // 2
            file.write_bytes(
                content[:middle]
                if damage == "cut"
                else content[:middle] + bytes([content[middle] ^ 128]) + content[middle + 1 :]
            )
            path, reasons = newest_valid(folder / "damaged")
            assert path is not None and path.name == "step-3", (name, damage)
            assert len(reasons) == 1 and name in reasons[0] and "damaged" in reasons[0], (name, damage, reasons)
    record_property("files damaged", 2 * len(names))
    shutil.copytree(folder / "whole", folder / "rotten")
    (folder / "rotten/checkpoints/step-4/optimizer.safetensors").write_bytes(b"")
    shutil.rmtree(folder / "rotten/final")
    run(folder, "rotten", **COSINE, eval_every=0, resume="auto")
    assert "optimizer.safetensors is damaged" in capsys.readouterr().out
    assert rows_of(folder / "rotten") == rows_of(folder / "whole")
    (folder / "rotten/checkpoints/step-4/model.safetensors").write_bytes(b"x")
    with pytest.raises(StorageError, match="step-4/model.safetensors is damaged") as caught:
        run(folder, "strict", **COSINE, eval_every=0, resume=folder / "rotten/checkpoints/step-4")  # no other is taken
    assert caught.value.exit_code == 3


def test_classes_of_settings() -> None:
    """Every config key declares its resume class."""
    classes = {kind: [] for kind in ("free", "needs a flag", "forbidden")}
    for key in flatten(to_dict(Config())):
        classes[class_of(key)].append(key)
    assert {"optimizer.learning_rate", "steps", "scoring.deadline", "tracking.run_name"} <= set(classes["free"])
    assert {"seed", "rewards", "model.name", "objective.beta", "data.path"} <= set(classes["needs a flag"])
    assert {"lora.r", "data.streaming"} <= set(classes["forbidden"])


def test_lines_about_changes() -> None:
    before = {"steps": 5, "seed": 0, "rewards": {"a": 1.0}, "resume": None, "gone": 1}
    assert check_changes(before, before | {"resume": "auto", "new": 3}, []) == []
    assert check_changes(before, before | {"steps": 9}, [], (2, 1)) == [
        "resume: steps 5 -> 9 (from here on)",
        "resume: 2 -> 1 processes (the same prompts in each step)",
    ]
    with pytest.raises(ConfigError, match=r"seed 0 -> 1; rewards \{'a': 1.0\} -> \{'b': 1.0\}.*'\[seed, rewards\]'"):
        check_changes(before, before | {"seed": 1, "rewards": {"b": 1.0}}, ["steps"])
    assert check_changes(before, before | {"seed": 1}, ["seed"]) == ["resume: seed 0 -> 1 (allowed)"]


def test_changed_sources_by_hand() -> None:
    one, other = {"file": "/a.py", "sha256": "1" * 64}, {"file": "/a.py", "sha256": "2" * 64}
    assert changed_sources({"r": one}, {"r": one, "new": other}) == {}
    assert "sha256 111111111111 -> 222222222222" in changed_sources({"r": one}, {"r": other})["rewards"][0]
    before, now = one | {"imports": {"/b.py": "3" * 64}}, one | {"imports": {"/b.py": "4" * 64, "/new.py": "5" * 64}}
    [line] = changed_sources({"r": before}, {"r": now})["rewards"]
    assert line.startswith("reward 'r' has") and "(/b.py, sha256 333333333333 -> 444444444444)" in line
    both = changed_sources({"r": before, "t": one}, {"r": now, "t": {**other, "key": "tools"}})
    assert both == {
        "rewards": [line],
        "tools": [
            "tool 't' has changed since the checkpoint was written (/a.py, sha256 111111111111 -> 222222222222)",
        ],
    }


def test_sources_are_those_that_were_loaded_and_what_they_import(tmp_path: Path) -> None:
    """Sibling modules count, through others too; an edit after the load does not change what a checkpoint records."""
    files = {
        "judge_a.py": "from sib_b import LIMIT\ndef judge(completions, **_): return [LIMIT for _ in completions]\n",
        "sib_b.py": "import json\nfrom sib_c import *\nLIMIT = VALUE\n",
        "sib_c.py": "VALUE = 1.0\n",
        "sib_unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    rewards = RewardSum({f"{tmp_path}/judge_a.py:judge": 1.0})
    old = {name: sha256_of(tmp_path / name) for name in files}
    (tmp_path / "judge_a.py").write_text("# edited\n" + files["judge_a.py"])
    (tmp_path / "sib_c.py").write_text("VALUE = 2.0\n")
    [source] = rewards.sources.values()
    assert source == {
        "file": str(tmp_path / "judge_a.py"),
        "sha256": old["judge_a.py"],
        "imports": {str(tmp_path / name): old[name] for name in ("sib_b.py", "sib_c.py")},
    }
    changed = changed_sources(rewards.sources, reward_sources(rewards.functions))["rewards"]
    assert [line.split("(")[1].split(",")[0] for line in changed] == [
        str(tmp_path / "judge_a.py"),
        str(tmp_path / "sib_c.py"),
    ]


def test_the_folder_of_a_run_means_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10):
        save_checkpoint(tmp_path / "run", step, {}, {"step": step}, keep=5)
    (tmp_path / "run" / "final").mkdir()
    newest = tmp_path / "run" / "checkpoints" / "step-10"
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints", newest):
        assert find_checkpoint(Config(resume=str(folder)), tmp_path) == newest
    for folder in (tmp_path / "run" / "final", tmp_path):
        with pytest.raises(ConfigError, match="holds no complete checkpoint. Give a run directory"):
            find_checkpoint(Config(resume=str(folder)), tmp_path)
