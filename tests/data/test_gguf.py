"""GGUF: which file a model's name means, what is refused before it is read, and the converted folder."""

import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.data import gguf
from grpo.data.gguf import check_gguf, gguf_path, plain_model
from grpo.errors import ConfigError, StorageError
from grpo.rollout.engine import saved_end_ids
from grpo.run.contents import hash_model
from tests.fakes import tiny_model
from tests.gguf_files import chat_tokenizer, write_gguf

pytest.importorskip("gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(*kinds: int, parts: int = 1, version: int = 3) -> bytes:
    """A GGUF's header with one number, one array of texts and one of numbers, and tensors of these types."""
    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("qwen2"),
        text("split.count") + struct.pack("<IH", 2, parts),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("é"),
        text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<2f", 1, 2),
    ]
    tensors = [text(f"t{n}") + struct.pack("<IQQIQ", 2, 32, 4, kind, 0) for n, kind in enumerate(kinds)]
    return b"GGUF" + struct.pack("<IQQ", version, len(kinds), len(pairs)) + b"".join(pairs + tensors)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\3\4", "is not a GGUF file: it does not begin with GGUF"),
        (header(0, version=1), "is GGUF version 1, needs 2 or 3"),
        (header(0, parts=3), "is one of 3 parts.*llama-gguf-split --merge"),
        (header(0, 15, 99, 8), "is quantized as Q8_K, type 99, which transformers cannot read.*Q8_0, Q6_K"),
        (header(0, 8)[:-3], "is damaged or was copied in part"),
        (header(0)[:40], "is damaged or was copied in part"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("key") + struct.pack("<I", 77), "is damaged"),
    ],
)
def test_what_is_refused_before_a_weight_is_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        plain_model(str(tmp_path / "m.gguf"))


def test_a_header_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(header(0, 1, 30, 2, 8, 12, 14, 20, 39))
    check_gguf(tmp_path / "m.gguf")


def test_the_file_that_a_name_means(tmp_path: Path) -> None:
    one, other = tmp_path / "one.gguf", tmp_path / "other.GGUF"
    for file in (one, other, tmp_path / "mmproj-one.gguf", tmp_path / "README.md"):
        file.touch()
    assert gguf_path(str(one)) == gguf_path(str(tmp_path)) == gguf_path(str(tmp_path), "one.gguf") == one
    assert gguf_path(str(other)) == other
    assert gguf_path("owner/name") is None
    (tmp_path / "two.gguf").touch()
    with pytest.raises(ConfigError, match=r"holds 2 GGUF files: set model.gguf_file to one of \['one.gguf', 'two"):
        gguf_path(str(tmp_path))
    with pytest.raises(ConfigError, match="holds no 'three.gguf'; it holds one.gguf, two.gguf"):
        gguf_path(str(tmp_path), "three.gguf")
    with pytest.raises(ConfigError, match="give one of them"):
        gguf_path(str(one), "two.gguf")
    with pytest.raises(ConfigError, match="there is no such file"):
        gguf_path(str(tmp_path / "none.gguf"))
    (tmp_path / "model.safetensors").touch()
    assert gguf_path(str(tmp_path)) is None
    assert gguf_path(str(tmp_path), "two.gguf") == tmp_path / "two.gguf"


def test_a_file_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: asked.append(names) or "/cache/m.gguf")
    assert gguf_path("owner/name", "sub/m.gguf") == gguf_path("owner/name/sub/m.gguf") == Path("/cache/m.gguf")
    assert asked == [("owner/name", "sub/m.gguf")] * 2

    def refuse(*_: str) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(ConfigError, match="'m.gguf' of owner/name cannot be downloaded: offline"):
        gguf_path("owner/name", "m.gguf")


def test_the_converted_folder(tmp_path: Path) -> None:
    """A plain folder with the same logits and ids and its special tokens, made once for each file."""
    tokenizer = chat_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    base = write_gguf(tmp_path / "base.gguf", model, tokenizer, quantized=False)
    folder = Path(plain_model(str(base)))
    again, ids = AutoTokenizer.from_pretrained(folder), torch.tensor([[40, 41, 42, 300]])
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        assert torch.allclose(loaded(ids).logits, model.eval()(ids).logits, atol=1e-5)
    assert loaded.config.rms_norm_eps == model.config.rms_norm_eps
    prompt = "what is 2 + 3? ünï <|im_end|>"
    assert again(prompt).input_ids == tokenizer(prompt).input_ids
    for name in ("chat_template", "eos_token_id", "pad_token_id", "bos_token_id"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    made = (folder / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "new").touch()
    assert (folder / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert plain_model(str(base)) == plain_model(str(folder)) == plain_model(str(folder), "base.gguf") == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [5, {tokenizer.eos_token_id}]}}')
    ends = sorted([5, tokenizer.eos_token_id])  # a file as model.name, a folder with gguf_file, and the result of both
    assert saved_end_ids(str(base), again) == saved_end_ids(str(tmp_path), again, "base.gguf") == ends
    assert saved_end_ids(str(folder), again) == ends
    before = hash_model(str(base))
    assert before == hash_model(str(tmp_path), "base.gguf")
    write_gguf(base, model, tokenizer, quantized=True)
    assert plain_model(str(base)) != str(folder) and hash_model(str(base)) not in (before, None)


def test_caches_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(header(0))
    monkeypatch.setattr(gguf, "cache_folders", lambda: [tmp_path / "no" / "folder"])
    with pytest.raises(StorageError, match="cannot be converted in the cache: .*Set GRPO_CACHE"):
        plain_model(str(tmp_path / "m.gguf"))


def test_a_model_that_transformers_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(header(0).replace(b"qwen2", b"nobod"))
    with pytest.raises(ConfigError, match="transformers cannot read this GGUF"):
        plain_model(str(tmp_path / "m.gguf"))
    assert gguf.MARK not in [file.name for file in tmp_path.rglob("*")]
