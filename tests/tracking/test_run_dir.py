"""Names of run directories: no two runs share one, and older names are found again."""

from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest
from accelerate import Accelerator

from grpo.config.parser import load_config
from grpo.errors import ConfigError, StorageError
from grpo.run.claim import claim_run_dir
from grpo.tracking.row_files import drop_rows_from, set_aside
from grpo.tracking.run_dir import choose_run_dir, fingerprint

NOW = datetime(2026, 1, 2, 3, 4, 5)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def chosen(*flags: str) -> Path:
    return choose_run_dir(load_config(["--model.name=m", *flags]), NOW)


def test_long_names_do_not_collide_and_older_folders_are_found() -> None:
    one, other = (chosen(f"--tracking.run_name={'x' * 120}{end}") for end in ("-one", "-other"))
    assert one != other and len(one.name) <= 100 and one.name.startswith("x" * 80)
    older = Path("outputs") / ("x" * 100)
    older.mkdir(parents=True)
    (older / "config.yaml").write_text(f"tracking:\n  run_name: {'x' * 120}-one\n")
    assert chosen(f"--tracking.run_name={'x' * 120}-one") == older
    assert chosen(f"--tracking.run_name={'x' * 120}-other") == other
    assert chosen(f"--tracking.run_name={'y' * 100}") == Path("outputs") / ("y" * 100)


def test_two_names_of_one_folder_are_two_runs() -> None:
    folder = chosen("--tracking.run_name=a b")
    assert folder == Path("outputs/a-b")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("tracking:\n  run_name: a b\n")
    assert chosen("--tracking.run_name=a b", "--resume=auto") == folder
    with pytest.raises(ConfigError, match="holds the run 'a b'"):
        chosen("--tracking.run_name=a-b", "--resume=auto")


def test_a_folder_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(StorageError, match="cannot read the run directory r: Permission denied"):
        chosen("--run_dir=r")


def test_two_starts_in_one_second_get_two_folders() -> None:
    """Both have chosen the same name before their weights loaded."""
    config = load_config(["--model.name=m"])
    run_dir = choose_run_dir(config, NOW)
    before, accelerator = fingerprint(run_dir), Accelerator(cpu=True)
    claims = [claim_run_dir(config, run_dir, before, accelerator) for _ in range(3)]
    assert [folder.name for folder, _ in claims] == [run_dir.name, f"{run_dir.name}-2", f"{run_dir.name}-3"]
    for _, lock in claims:
        assert lock is not None
        lock.release()


def test_a_run_that_was_written_while_another_one_loaded_is_left_alone(tmp_path: Path) -> None:
    config = load_config(["--model.name=m", f"--run_dir={tmp_path}/r"])
    before, accelerator = fingerprint(tmp_path / "r"), Accelerator(cpu=True)
    (tmp_path / "r" / "checkpoints" / "step-3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="was written by another run while this one loaded"):
        claim_run_dir(config, tmp_path / "r", before, accelerator)
    _, lock = claim_run_dir(config, tmp_path / "r", fingerprint(tmp_path / "r"), accelerator)
    cast(Any, lock).release()


def rows(*steps: int) -> str:
    return "".join(f'{{"step": {step}, "text": "é"}}\n' for step in steps)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (rows(1, 2, 2, 3, 4), rows(1, 2, 2)),
        (rows(1, 2) + '{"step": 2, "te', rows(1, 2)),  # cut off by a crash
        (rows(1, 2), rows(1, 2)),
        (rows(3, 4), ""),
        (rows(1, 3, 2, 4), rows(1, 2)),  # not in order: written by hand
        ("", ""),
    ],
)
def test_rows_of_later_steps_are_cut_off_in_place(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(before, encoding="utf-8")
    inode = path.stat().st_ino
    drop_rows_from(path, 3)
    assert path.read_text(encoding="utf-8") == after
    assert (path.stat().st_ino == inode) == (before != rows(1, 3, 2, 4))  # no second file, which may not fit
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_full_disk_leaves_no_half_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows(1, 3, 2))

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grpo.tracking.row_files.sync", full)
    with pytest.raises(OSError, match="No space"):
        drop_rows_from(path, 3)
    assert path.read_text() == rows(1, 3, 2) and len(list(tmp_path.iterdir())) == 1


def test_rows_of_a_start_without_a_checkpoint_are_kept(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(rows(number))
        (tmp_path / "rollouts.jsonl").touch()
        folder = set_aside(tmp_path, ["metrics.jsonl", "rollouts.jsonl", "none.jsonl"])
        assert folder == tmp_path / f"records-{number}"
        assert (folder / "metrics.jsonl").read_text() == rows(number) and not (tmp_path / "metrics.jsonl").exists()
    assert set_aside(tmp_path, ["metrics.jsonl", "rollouts.jsonl"]) is None
