"""File operations that a file system refuses: fsync of folders, removal, a cache that cannot be written."""

import errno
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo.runtime import storage
from grpo.runtime.storage import cache_folders, remove, replace_folder, share_mode, sync


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_said", set())


def refuse_fsync(monkeypatch: pytest.MonkeyPatch, number: int, applies: Callable[[int], bool]) -> None:
    """Let fsync fail with `number` for the files of which `applies(mode)` is true."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if applies(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.ENOSYS, errno.EROFS])
def test_a_file_system_without_fsync_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    refuse_fsync(monkeypatch, number, stat.S_ISDIR)
    with caplog.at_level(logging.WARNING):
        sync(tmp_path)
        sync(tmp_path)
    assert [record.message for record in caplog.records] == [
        f"the file system does not sync folders to disk ({os.strerror(number)}): a power cut may lose the last save"
    ]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_data_that_is_not_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    (tmp_path / "a").write_text("a")
    refuse_fsync(monkeypatch, number, stat.S_ISREG)
    with pytest.raises(OSError, match=os.strerror(number).split()[0]):
        sync(tmp_path / "a")


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "kept" / "inside").mkdir(parents=True)
    for name, target in (("folder", tmp_path / "kept"), ("dangling", tmp_path / "nothing")):
        (tmp_path / name).symlink_to(target)
        assert remove(tmp_path / name)
        assert not os.path.lexists(tmp_path / name)
    assert (tmp_path / "kept" / "inside").is_dir()
    assert remove(tmp_path / "nothing")


def test_what_cannot_be_removed_is_left_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: object, *_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))  # a file that another machine has open

    monkeypatch.setattr("shutil.rmtree", busy)
    with caplog.at_level(logging.WARNING):
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            assert not remove(tmp_path / name)
    assert len(caplog.records) == 1 and "cannot remove" in caplog.text and "training goes on" in caplog.text


def test_a_folder_takes_the_place_of_another_one_or_of_a_link(tmp_path: Path) -> None:
    for name in ("new", "old", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "new"
    (tmp_path / "link").symlink_to(tmp_path / "target")
    replace_folder(tmp_path / "old", tmp_path / "link")
    assert (tmp_path / "link" / "file").read_text() == "new" and not (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]
    assert (tmp_path / "target" / "file").read_text() == "target"


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_files_get_the_mode_of_the_umask(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True, mode=0o700)
    (tmp_path / "a").chmod(0o700)
    (tmp_path / "a" / "b" / "weights").write_text("w")
    (tmp_path / "a" / "b" / "weights").chmod(0o600)
    before = os.umask(umask)
    try:
        share_mode(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "b" / "weights").stat().st_mode) == file
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == folder
    assert os.listdir(tmp_path / "a") == ["b"]


def test_without_a_cache_folder_a_temporary_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """GRPO_CACHE below a file, and a user without a home folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "file" / "cache"))
    [temporary] = cache_folders()
    assert temporary.parent == tmp_path and stat.S_IMODE(temporary.stat().st_mode) == 0o700
    monkeypatch.delenv("GRPO_CACHE")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with caplog.at_level(logging.INFO):
        assert list(cache_folders()) == [temporary]
    assert "set GRPO_CACHE to a folder of yours" in caplog.text


def test_a_temporary_cache_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"grpo-cache-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "good"))
    assert list(cache_folders()) == [tmp_path / "good"]
