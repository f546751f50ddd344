"""grpo verify: a replay is equal to the bit, and one changed reward, token, weight or data row is named."""

import json
import shutil
from pathlib import Path

import pytest

from grpo.config.parser import load_config
from grpo.errors import ConfigError, Mismatch, StorageError
from grpo.run.checkpoint import load_checkpoint, save_checkpoint
from grpo.tools.verify import main, summary, verify
from grpo.trainer import train
from tests.fakes import tiny_data, tiny_folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints of steps 2 and 4, in a folder with its model and data."""
    place = tmp_path_factory.mktemp("verify")
    tiny_folder(place / "model")
    tiny_data(place / "data.jsonl")
    settings = {
        "model.name": place / "model",
        "data.path": place / "data.jsonl",
        "data.system_prompt": "null",
        "run_dir": place / "run",
        "steps": 4,
        "prompts_per_step": 2,
        "sampling.num_generations": 4,
        "sampling.max_completion_length": 6,
        "optimizer.learning_rate": 0.01,
        "eval_every": 0,
        "save_every": 2,
        "scoring.workers": 0,
        "tracking.report_to": "[]",
        "tracking.report": "false",
        "rewards": '{"tests.letters:count_letters": 1.0}',
    }
    train(load_config([f"--{key}={value}" for key, value in settings.items()]))
    return place


def copied(recorded: Path, place: Path) -> Path:
    return Path(shutil.copytree(recorded / "run", place / "run"))


def test_a_replay_is_equal_to_the_bit(recorded: Path) -> None:
    files = {path: path.read_bytes() for path in (recorded / "run").rglob("*") if path.is_file()}
    found = verify(recorded / "run", [1, 3, 4])
    assert found.differences == [] and found.environment == []
    record = json.loads((recorded / "run" / "environment.json").read_text())
    assert record["kernels"].startswith("kernels: ") and {"data", "base"} <= record["derived"]["contents"].keys()
    assert found.completions == 3 * 8 and found.metrics > 30 and found.tensors > 30  # weights and both moments
    assert "all equal to the bit" in summary(found)
    assert files == {path: path.read_bytes() for path in (recorded / "run").rglob("*") if path.is_file()}


def edit_row(run: Path, step: int, **changes: object) -> None:
    path = run / "rollouts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = next(row for row in rows if row["step"] == step)
    row |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_changed_reward_and_a_changed_completion_are_named(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(recorded, tmp_path)
    edit_row(run, 3, reward=17.0)
    edit_row(run, 4, completion="another")
    with pytest.raises(Mismatch, match=r"step 3, reward of draw \d+, sample \d+: 17.0 recorded"):
        main([f"--run={run}", "--steps", "3,4"])
    assert "completion of draw" in capsys.readouterr().out


@pytest.mark.slow
def test_a_changed_weight_is_named(recorded: Path, tmp_path: Path) -> None:
    run = copied(recorded, tmp_path)
    tensors, state = load_checkpoint(run / "checkpoints" / "step-4")
    name = next(name for name in tensors["model"] if name.endswith("q_proj.weight"))
    tensors["model"][name][0, 0] += 0.25
    save_checkpoint(run, 4, tensors, state, 9)  # with new checksums
    [difference] = verify(run, [4]).differences
    assert difference.what == f"model {name} (largest difference)"
    assert difference.replayed == pytest.approx(0.25, abs=1e-6)
    weights = run / "checkpoints" / "step-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")  # without new checksums
    with pytest.raises(StorageError, match="step-2"):
        verify(run, [4])


@pytest.mark.slow
def test_a_changed_data_row_is_named(recorded: Path, tmp_path: Path) -> None:
    run = copied(recorded, tmp_path)
    data = recorded / "data.jsonl"
    before = data.read_text()
    drawn = json.loads((run / "rollouts.jsonl").read_text().splitlines()[0])
    try:
        lines = [json.loads(line) for line in before.splitlines()]
        [line] = [line for line in lines if line["question"] == drawn["prompt"]]
        line["answer"] = "#### 99"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sha256, row, *_ = verify(run, [4]).differences
        assert sha256.what == "sha256 of data"
        assert row.what == f"data row of draw {drawn['draw']}, {drawn['prompt']!r}"
        assert (row.recorded["answer"], row.replayed["answer"]) == (drawn["columns"]["answer"], "99")
        shutil.rmtree(run / "checkpoints")  # environment.json has the checksums, too
        assert verify(run, [1]).differences[0].what == "sha256 of data"
    finally:
        data.write_text(before)


def test_what_cannot_be_verified_is_refused(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        verify(tmp_path)
    with pytest.raises(ConfigError, match="records steps 1 to 4"):
        verify(recorded / "run", [5])
    with pytest.raises(ConfigError, match="such as 3,17"):
        main([f"--run={recorded / 'run'}", "--steps", "three"])
