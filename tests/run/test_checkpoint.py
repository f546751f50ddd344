"""Checkpoints: restored to the bit, written atomically; damaged ones are reported and skipped."""

import errno
import json
import logging
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.config.parser import load_config
from grpo.errors import StorageError
from grpo.models.optimizer_state import optimizer_from_tensors, optimizer_to_tensors
from grpo.run.checkpoint import load_checkpoint, newest_valid, save_checkpoint, seconds_to_write
from grpo.run.checkpointer import find_checkpoint
from grpo.runtime import storage
from tests import syscalls
from tests.runtime.test_storage import refuse_fsync


def small(value: float = 1.0) -> dict[str, dict[str, Tensor]]:
    return {"policy": {"weight": torch.full((2, 3), value)}}


def save(run_dir: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(run_dir, step, small(step), {"step": step}, keep)


def names(run_dir: Path) -> list[str]:
    return sorted(os.listdir(run_dir / "checkpoints"))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    tensors = {
        "policy": {"a": torch.tensor([1.5, float("nan"), -0.0]), "b": torch.tensor(7, dtype=torch.int64)},
        "optimizer": {"rng": torch.tensor([0, 255], dtype=torch.uint8)},
        "empty": {},
    }
    path = save_checkpoint(tmp_path, 12, tensors, {"step": 12, "best": 0.1, "names": ["a"]}, keep=1)
    loaded, state = load_checkpoint(path)

    assert path == tmp_path / "checkpoints" / "step-12"
    assert state == {"step": 12, "best": 0.1, "names": ["a"]}
    assert set(loaded) == {"policy", "optimizer", "empty"} and loaded["empty"] == {}
    assert loaded["policy"]["a"].view(torch.int32).equal(tensors["policy"]["a"].view(torch.int32))  # bits: nan, -0.0
    assert loaded["policy"]["b"].equal(tensors["policy"]["b"])
    assert loaded["optimizer"]["rng"].equal(tensors["optimizer"]["rng"])
    assert sorted(os.listdir(path)) == [
        "empty.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "policy.safetensors",
        "state.json",
    ]


def test_tied_and_transposed_tensors_are_saved_as_values(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    group = {"embed": weight, "head": weight, "transposed": weight.T, "first_row": weight[0], "parameter": None}
    group["parameter"] = torch.nn.Parameter(weight.clone())
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 1, {"policy": group}, {}, keep=1))

    for name in ("embed", "head", "parameter"):
        assert loaded["policy"][name].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["policy"]["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert loaded["policy"]["first_row"].tolist() == [0, 1, 2]
    assert weight.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_adamw_goes_on_exactly_as_if_never_saved(tmp_path: Path) -> None:
    def start() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "lr": torch.tensor(0.02)}]
        return model, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95))

    def learn(model: torch.nn.Linear, optimizer: torch.optim.AdamW, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(torch.full((2, 4), step + 0.5)).square().sum().backward()
            optimizer.step()

    straight, straight_optimizer = start()
    learn(straight, straight_optimizer, range(6))

    first, first_optimizer = start()
    learn(first, first_optimizer, range(3))
    tensors, encoded = optimizer_to_tensors(first_optimizer.state_dict())
    path = save_checkpoint(
        tmp_path, 3, {"policy": first.state_dict(), "optimizer": tensors}, {"optimizer": encoded}, keep=1
    )

    loaded, state = load_checkpoint(path)
    resumed, resumed_optimizer = start()
    resumed.load_state_dict(loaded["policy"])
    restored = optimizer_from_tensors(loaded["optimizer"], state["optimizer"])
    before = first_optimizer.state_dict()
    assert restored["param_groups"] == before["param_groups"]
    assert restored["param_groups"][0]["betas"] == (0.8, 0.95)
    assert list(restored["state"]) == [0, 1]
    for index in (0, 1):
        for key, value in before["state"][index].items():
            assert restored["state"][index][key].equal(value)
    resumed_optimizer.load_state_dict(restored)
    learn(resumed, resumed_optimizer, range(3, 6))

    assert resumed.weight.equal(straight.weight)
    assert resumed.bias.equal(straight.bias)


def test_the_newest_stay_and_older_ones_go(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):  # by number: as text, 9 would be the newest
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-10", "step-100"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = save_checkpoint(tmp_path, 5, small(7.0), {"again": True}, keep=2)
    tensors, state = load_checkpoint(path)

    assert names(tmp_path) == ["step-5"]
    assert state == {"again": True} and tensors["policy"]["weight"][0, 0] == 7


def test_a_replacement_that_was_interrupted_is_undone(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    path.rename(path.with_name(".old-step-5"))  # killed between the two renames

    assert newest_valid(tmp_path) == (path, [])
    assert load_checkpoint(path)[1] == {"step": 5}


@pytest.mark.parametrize(
    "damage, says",
    [
        (
            lambda path: os.truncate(path / "policy.safetensors", 40),
            r"policy\.safetensors is damaged: .*40 of \d+ bytes",
        ),
        (lambda path: flip_last_byte(path / "policy.safetensors"), r"policy\.safetensors is damaged: .*sha256 differs"),
        (lambda path: flip_last_byte(path / "state.json"), r"state\.json is damaged"),
        (lambda path: (path / "policy.safetensors").unlink(), r"policy\.safetensors is missing"),
        (lambda path: (path / "manifest.json").unlink(), r"has no manifest\.json"),
        (lambda path: (path / "manifest.json").write_text("{"), r"manifest\.json is damaged"),
        (lambda path: (path / "manifest.json").write_text('{"files": {}}'), r"state\.json is damaged"),
        (lambda path: (path / "manifest.json").write_text('{"files": {"../x": {"size": 1, "sha256": ""}}}'), "damaged"),
    ],
    ids=["truncated", "flipped", "state", "missing", "no manifest", "torn manifest", "empty manifest", "path"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, damage, says: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad)

    with pytest.raises(StorageError, match=says):
        load_checkpoint(bad)
    path, reasons = newest_valid(tmp_path)
    assert path == good
    assert len(reasons) == 1 and reasons[0].startswith("ignoring step-2: ")


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) == (None, [])
    assert newest_valid(tmp_path / "nowhere") == (None, [])
    with pytest.raises(StorageError, match=r"has no manifest\.json"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("function", ["save_file", "_fingerprint", "sync", "os.replace"])
def test_a_full_disk_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    good = save(tmp_path, 1)
    with monkeypatch.context() as patch:

        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(f"grpo.run.checkpoint.{function}", full)
        with pytest.raises(StorageError, match=r"step-2: .*No space left on device.*It needs 0\.0 MB"):
            save(tmp_path, 2)

    assert names(tmp_path) == ["step-1"]
    assert newest_valid(tmp_path) == (good, [])
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-1", "step-2"]


def test_a_file_size_limit_is_a_storage_error(tmp_path: Path) -> None:
    """The operating system refuses the write; no function is patched."""
    resource = pytest.importorskip("resource")
    good = save(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(StorageError, match="step-2"):
            save_checkpoint(tmp_path, 2, {"policy": {"weight": torch.zeros(100_000)}}, {}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)

    assert names(tmp_path) == ["step-1"]
    assert newest_valid(tmp_path) == (good, [])


def test_killed_at_any_moment_of_a_save(tmp_path: Path) -> None:
    """The process dies before its n-th system call: a valid checkpoint always exists."""
    program = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from grpo.run import checkpoint\n"
        "folder = Path(sys.argv[1])\n"
        "weight = {'policy': {'weight': torch.ones(3)}}\n"
        "left = 10**9\n"
        "def counted(function):\n"
        "    def call(*arguments, **named):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left < 0:\n"
        "            os._exit(9)\n"  # no clean-up handler runs, as with kill -9
        "        return function(*arguments, **named)\n"
        "    return call\n"
        "for name in ('save_file', '_fingerprint', 'sync', '_prune', '_clean_up'):\n"
        "    setattr(checkpoint, name, counted(getattr(checkpoint, name)))\n"
        "checkpoint.os.replace = counted(os.replace)\n"
        "for moment in range(40):\n"
        "    run = folder / str(moment)\n"
        "    checkpoint.save_checkpoint(run, 1, weight, {'moment': 1}, keep=1)\n"
        "    if os.fork() == 0:\n"
        "        left = moment\n"
        "        checkpoint.save_checkpoint(run, 1, weight, {'moment': 2}, keep=1)\n"
        "        checkpoint.save_checkpoint(run, 2, weight, {'moment': 3}, keep=1)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])

    outcomes = []
    for moment in range(40):
        path, reasons = newest_valid(tmp_path / str(moment))
        assert path is not None and reasons == [], moment
        outcomes.append(load_checkpoint(path)[1]["moment"])
        save(tmp_path / str(moment), 3, keep=1)
        assert names(tmp_path / str(moment)) == ["step-3"]
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2, 3}


@pytest.mark.skipif(not syscalls.available(), reason="needs ptrace on x86-64 Linux")
@pytest.mark.parametrize("step", [2, 1], ids=["prunes", "replaces"])
def test_killed_before_every_call_that_changes_a_file(tmp_path: Path, step: int, record_property: Any) -> None:
    """kill -9 before each write, fsync, rename, removal of a save, found by tracing its system calls: what is loaded
    afterwards is the checkpoint before or this one, whole; and the next save cleans up."""
    tensors = {"policy": {"weight": torch.ones(3000)}, "optimizer": {"moment": torch.ones(7)}}
    killed, names_of_calls, outcomes = True, [], []
    while killed:
        point = len(outcomes) + 1
        run_dir = tmp_path / str(point)
        save_checkpoint(run_dir, 1, tensors, {"save": 1}, keep=1)
        killed, names_of_calls = syscalls.killed_before(
            lambda run_dir=run_dir: save_checkpoint(run_dir, step, tensors, {"save": 2}, keep=1),  # type: ignore[misc]
            point,
        )
        path, reasons = newest_valid(run_dir)
        assert path is not None and reasons == [], (point, names_of_calls)
        outcomes.append(load_checkpoint(path)[1]["save"])
        save(run_dir, 3, keep=1)
        assert names(run_dir) == ["step-3"], (point, names_of_calls)
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}
    assert {"write", "fsync", "rename", "unlinkat", "mkdir"} <= set(names_of_calls)
    assert len(names_of_calls) == len(outcomes) - 1 >= 20
    record_property("points killed", len(names_of_calls))


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_said", set())


@pytest.mark.usefixtures("nothing_said")
def test_a_pruned_link_costs_nothing(tmp_path: Path) -> None:
    """An old checkpoint that was moved to another disk, and one whose disk is gone."""
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-1").rename(tmp_path / "cold")
    (tmp_path / "checkpoints" / "step-1").symlink_to(tmp_path / "cold")
    (tmp_path / "checkpoints" / "step-0").symlink_to(tmp_path / "nowhere")
    for step in (2, 3, 4):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-3", "step-4"]
    assert (tmp_path / "cold" / "manifest.json").is_file()


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize("refused", ["shutil.rmtree", "os.replace of old ones"])
def test_an_old_checkpoint_that_cannot_be_removed_stays_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    """On NFS, while another machine has it open; in a folder of another user. Nothing of it ever counts as valid."""
    real = os.replace

    def replace(old: Any, new: Any) -> None:
        if Path(new).name.startswith(".tmp-"):
            raise PermissionError(1, "Operation not permitted", str(old))
        real(old, new)

    def busy(path: Any, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        if refused == "shutil.rmtree":
            patch.setattr("shutil.rmtree", busy)
        else:
            patch.setattr("os.replace", replace)
        for step in (1, 2, 3, 4, 2):  # the last one replaces a save of its own
            path = save(tmp_path, step, keep=1)
            assert load_checkpoint(path)[1] == {"step": step}
    assert len(caplog.records) == 1 and "cannot remove" in caplog.text
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-5"]


@pytest.mark.usefixtures("nothing_said")
def test_a_file_system_that_syncs_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_fsync(monkeypatch, errno.EINVAL, stat.S_ISDIR)
    for step in (1, 2):
        assert load_checkpoint(save(tmp_path, step))[1] == {"step": step}
    assert len(caplog.records) == 1


def test_files_of_a_checkpoint_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o644}
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_a_checkpoint_that_may_not_be_read_is_no_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older checkpoint in its place would lose steps without need."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    real = Path.read_text

    def read(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "manifest.json" and path.parent.name == "step-2":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)
    with pytest.raises(StorageError, match=r"cannot read .*manifest\.json: Permission denied\. Ask its owner"):
        newest_valid(tmp_path)


def config_of(run_dir: Path) -> Any:
    return load_config(["--model.name=m", f"--run_dir={run_dir}", "--resume=auto"])


def test_damaged_checkpoints_are_not_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path, 4)
    flip_last_byte(path / "policy.safetensors")
    with pytest.raises(StorageError, match=r"no checkpoint in .* is whole \(1 damaged\): ignoring step-4: "):
        find_checkpoint(config_of(tmp_path), tmp_path)
    assert "ignoring step-4" in caplog.text


def test_nothing_to_resume_is_said_with_the_runs_beside_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "renamed", 4)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with caplog.at_level(logging.INFO):
        assert find_checkpoint(config_of(tmp_path / "renamde"), tmp_path / "renamde") is None
    assert [record.message for record in caplog.records] == [
        f"resume auto: no checkpoint in {tmp_path / 'renamde'}: the run starts at step 0; runs with checkpoints beside "
        f"it: {tmp_path / 'renamed'}"
    ]


def test_the_time_of_a_save_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.5])
    monkeypatch.setattr("grpo.run.checkpoint.time.perf_counter", lambda: next(times))
    assert seconds_to_write(tmp_path, 160_000_000) == 5.0  # ten times the sample
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr("grpo.run.checkpoint.time.perf_counter", lambda: 0.0)
    assert seconds_to_write(tmp_path / "nowhere", 10) == 0.0


def test_what_is_not_plain_is_refused() -> None:
    with pytest.raises(TypeError, match=r"param_groups\.0\.hook is a function"):
        optimizer_to_tensors({"state": {}, "param_groups": [{"hook": lambda: None}]})


def test_state_is_json_not_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert json.loads((path / "state.json").read_text()) == {"step": 1}
