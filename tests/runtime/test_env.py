"""Keys from .env: set variables win, empty values and broken lines are ignored, other variables stay out."""

import os
from pathlib import Path

import pytest

from grpo.runtime import env as keys


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
