"""Environment: keys from .env in any encoding, numbers in variables, variables that are set but empty."""

import logging
import os
from pathlib import Path

import pytest

from grpo.errors import ConfigError
from grpo.runtime import env as keys
from grpo.runtime.messages import rank_prefix


@pytest.mark.parametrize(
    ("text", "already", "token"),
    [
        (None, None, None),
        ("HF_TOKEN=hf_file\n", None, "hf_file"),
        ("HF_TOKEN=hf_file\n", "hf_shell", "hf_shell"),
        (None, "hf_shell", "hf_shell"),
        ("HF_TOKEN=\n", None, None),
        ("this is no line of it\nHF_TOKEN='hf_file'\r\n", None, "hf_file"),
        ("\ufeffHF_TOKEN=hf_file\r\n", None, "hf_file"),
    ],
)
def test_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, already: str | None, token: str | None
) -> None:
    monkeypatch.setattr(keys, "source_checkout", lambda: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {} if already is None else {"HF_TOKEN": already})
    if text is not None:
        (tmp_path / ".env").write_text(text, encoding="utf-8")
    keys.load_keys()
    assert os.environ.get("HF_TOKEN") == token


def test_the_nearer_file_wins_and_other_variables_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / ".env").write_text("WANDB_API_KEY=here\nPATH=/evil\n")
    (tmp_path / ".env").write_text("WANDB_API_KEY=root\nHF_TOKEN=root\n")
    monkeypatch.setattr(keys, "source_checkout", lambda: tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(os, "environ", {})
    keys.load_keys()
    assert os.environ == {"WANDB_API_KEY": "here", "HF_TOKEN": "root"}


def test_an_installed_package_has_no_source_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed wheel does not read a .env in site-packages."""
    file = tmp_path / "site-packages" / "grpo" / "runtime" / "env.py"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(keys, "__file__", str(file))
    assert keys.source_checkout() is None
    (tmp_path / "site-packages" / "pyproject.toml").touch()
    assert keys.source_checkout() == tmp_path / "site-packages"


@pytest.mark.parametrize(
    ("content", "token"),
    [
        ("HF_TOKEN=hf_file\n".encode("utf-16"), "hf_file"),  # PowerShell's >
        ("HF_TOKEN=hf_file\r\n".encode("utf-16-le"), "hf_file"),
        ("HF_TOKEN=hf_file\n".encode("utf-16-be"), "hf_file"),
        ("# Schlüssel\nHF_TOKEN=hf_file\n".encode("cp1252"), "hf_file"),
        (b"HF_TOKEN=hf_file\n\xff\x00\x81", None),  # no text: not a key, and no error
    ],
)
def test_the_encodings_of_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, token: str | None
) -> None:
    monkeypatch.setattr(keys, "source_checkout", lambda: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {})
    (tmp_path / ".env").write_bytes(content)
    keys.load_keys()
    assert os.environ.get("HF_TOKEN") == token


def test_a_file_that_cannot_be_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another user's .env in a shared checkout; and a working directory that was removed."""
    real = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path.name == ".env":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(keys, "source_checkout", lambda: tmp_path)
    monkeypatch.setattr(Path, "read_bytes", denied)
    (tmp_path / ".env").touch()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with caplog.at_level(logging.WARNING):
        keys.load_keys()
    assert [record.message for record in caplog.records][1:] == [
        f"{tmp_path / '.env'} is passed over: Permission denied"
    ]


@pytest.mark.parametrize(("text", "number"), [("4", 4), (" 4 ", 4), ("2,1", 2), ("", 7), (" ", 7), (",", 7), (None, 7)])
def test_numbers_in_variables(monkeypatch: pytest.MonkeyPatch, text: str | None, number: int) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if text is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert keys.env_count("OMP_NUM_THREADS", 7) == number


def test_a_variable_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two', needs to be a whole number"):
        keys.env_count("WORLD_SIZE", 1)


def test_empty_variables_of_the_launch_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    left = {"CUDA_VISIBLE_DEVICES": "", "MY_OWN": "", "RANK": "0"}
    monkeypatch.setattr(
        os, "environ", {"WORLD_SIZE": "", "OMP_NUM_THREADS": " ", "ACCELERATE_USE_CPU": "", "LOCAL_RANK": ""} | left
    )
    assert rank_prefix() == ""
    keys.drop_empty_variables()
    assert os.environ == left
