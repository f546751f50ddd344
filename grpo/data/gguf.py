"""GGUF: one file of llama.cpp or Ollama -> a plain model folder in the cache, converted once and found again.

    models/smollm2.Q4_1.gguf           model.name, a file
    models                             model.name, a folder that holds one GGUF and no other weights
    models      + model.gguf_file      one of several
    owner/name  + model.gguf_file      from the hub
        -> ~/.cache/grpo/gguf-<key>/   config.json, model.safetensors in float32, tokenizer, gguf.json

Everything else (training, PEFT, vLLM, evaluation) then reads a folder of transformers.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from grpo.errors import ConfigError, StorageError, raise_device_error
from grpo.runtime.storage import cache_folders, cache_root, replace_folder, share_mode

log = logging.getLogger(__name__)

MARK = "gguf.json"
"""In a converted folder: the file that it was made from."""
INSTALL = "pip install gguf==0.19.0"
TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
"""Tensor types by the number that is in the file (enum ggml_type)."""
UNREADABLE = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
"""Types that transformers cannot dequantize. So are types that are not in TYPES."""
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


def plain_model(name: str, gguf_file: str | None = None) -> str:
    """Return a folder or hub id that transformers loads: the converted folder of a GGUF, else `name` itself.

    Raises:
        ConfigError: The GGUF is missing, ambiguous, damaged, or of a kind that transformers cannot read.
    """
    path = gguf_path(name, gguf_file)
    return name if path is None else str(_converted(path))


def gguf_path(name: str, gguf_file: str | None = None) -> Path | None:
    """Return the GGUF that `model.name` and `model.gguf_file` mean, or None for a model in another form."""
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if gguf_file is not None and Path(gguf_file).name != path.name:
            raise ConfigError(f"model.name is '{name}', model.gguf_file is '{gguf_file}': give one of them")
        if path.is_file():
            return path
        owner, _, rest = name.partition("/")
        repository, _, file = rest.partition("/")
        if file and owner not in ("", ".", "..", "~") and not Path(owner).exists():
            return _from_hub(f"{owner}/{repository}", file)
        raise ConfigError(f"model.name '{name}' cannot be loaded: there is no such file")
    if path.is_dir():
        if (path / MARK).is_file():
            return None
        return _in_folder(path, name, gguf_file)
    return None if gguf_file is None else _from_hub(name, gguf_file)


def _in_folder(folder: Path, name: str, gguf_file: str | None) -> Path | None:
    there = sorted(file.name for file in folder.glob("*.gguf") if not file.name.startswith("mmproj"))
    if gguf_file is not None:
        if gguf_file in there:
            return folder / gguf_file
        raise ConfigError(f"model.gguf_file: {name} holds no '{gguf_file}'; it holds {', '.join(there) or 'no GGUF'}")
    other = ["adapter_config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin"]
    if not there or any(any(folder.glob(pattern)) for pattern in other):
        return None
    if len(there) > 1:
        raise ConfigError(f"model.name '{name}' holds {len(there)} GGUF files: set model.gguf_file to one of {there}")
    return folder / there[0]


def _from_hub(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ConfigError(f"model.gguf_file: '{file}' of {repository} cannot be downloaded: {error}") from error


def check_gguf(path: Path) -> None:
    """Read the header of a GGUF.

    Raises:
        ConfigError: It is not a GGUF, is one part of several, is damaged, or holds tensors that cannot be read.
    """
    try:
        with path.open("rb") as file:
            metadata, types = _header(file)
    except (struct.error, EOFError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise ConfigError(f"model.name '{path}' is damaged or was copied in part: copy it again") from error
    except OSError as error:
        raise ConfigError(f"model.name '{path}' cannot be read: {error}") from error
    if int(metadata.get("split.count") or 1) > 1:
        raise ConfigError(
            f"model.name '{path}' is one of {metadata['split.count']} parts, which transformers cannot read: join "
            f"them with llama.cpp: llama-gguf-split --merge FIRST_PART OUTPUT"
        )
    unknown = sorted({TYPES.get(kind, f"type {kind}") for kind in types} - (set(TYPES.values()) - UNREADABLE))
    if unknown:
        raise ConfigError(
            f"model.name '{path}' is quantized as {', '.join(unknown)}, which transformers cannot read: use another "
            f"quantization of the model (Q8_0, Q6_K, Q4_K_M, F16)"
        )


def _header(file: BinaryIO) -> tuple[dict[str, Any], list[int]]:
    """Return the metadata (numbers, and the text of short values) and the type of each tensor."""
    if file.read(4) != b"GGUF":
        raise ConfigError(f"model.name '{file.name}' is not a GGUF file: it does not begin with GGUF")
    (version,) = _read(file, "I")
    if version not in (2, 3):
        raise ConfigError(f"model.name '{file.name}' is GGUF version {version}, needs 2 or 3: convert the model again")
    tensors, pairs = _read(file, "QQ")
    metadata = {}
    for _ in range(pairs):
        key = _text(file)
        metadata[key] = _value(file, *_read(file, "I"))
    types = []
    for _ in range(tensors):
        _text(file)
        (dimensions,) = _read(file, "I")
        kind, _ = _read(file, f"{dimensions}QIQ")[-2:]
        types.append(kind)
    return metadata, types


def _read(file: BinaryIO, form: str) -> tuple[Any, ...]:
    size = struct.calcsize("<" + form)
    return struct.unpack("<" + form, file.read(size))


def _text(file: BinaryIO) -> str:
    (length,) = _read(file, "Q")
    found = file.read(length)
    if len(found) < length:
        raise EOFError
    return found.decode("utf-8", errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        return _read(file, _NUMBERS[kind])[0] if kind in _NUMBERS else _damaged()
    inner, count = _read(file, "IQ")
    if inner in _NUMBERS:
        file.seek(struct.calcsize("<" + _NUMBERS[inner]) * count, os.SEEK_CUR)
        return None
    for _ in range(count):
        _value(file, inner)
    return None


def _damaged() -> Any:
    raise EOFError


def _converted(path: Path) -> Path:
    """Return the plain folder of a GGUF, made now if it is not in the cache. One process makes it, others wait."""
    stat = path.stat()
    source = {"file": str(path.resolve()), "bytes": stat.st_size, "modified": stat.st_mtime_ns}
    name = f"gguf-{hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]}"
    if (cache_root() / name / MARK).is_file():
        return cache_root() / name
    check_gguf(path)
    failed: OSError | None = None
    for root in cache_folders():
        try:
            return _find_or_make(root / name, path, source)
        except OSError as error:
            failed = error
    raise StorageError(
        f"{path} cannot be converted in the cache: {failed}. Set GRPO_CACHE to a folder with room for the model in "
        f"float32 (four bytes for each weight)"
    )


def _find_or_make(folder: Path, path: Path, source: dict[str, Any]) -> Path:
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if not (folder / MARK).is_file():
            log.info("%s: converting to float32, once (%s)", path.name, folder)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gguf-") as temporary:
                made = Path(temporary) / "model"
                _convert(path, made)
                (made / MARK).write_text(json.dumps(source), encoding="utf-8")
                share_mode(made)
                replace_folder(made, folder)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: the same folder is made twice
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(path: Path, folder: Path) -> None:
    """Write the model in float32, and its tokenizer."""
    import numpy
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # With the package `kernels`, newer versions keep the quantized blocks of some architectures unless told not to.
    config = getattr(transformers, "GgufConfig", None)
    plain = {"quantization_config": config(dequantize=True)} if config is not None else {}
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, trust_remote_code=False, **plain)
    except ImportError as error:
        raise ConfigError(f"model.name '{path}': a GGUF needs the package gguf: {INSTALL}") from error
    except OSError as error:
        raise ConfigError(f"model.name '{path}' cannot be loaded: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise_device_error(error)
        raise ConfigError(
            f"model.name '{path}': transformers cannot read this GGUF ({type(error).__name__}: {error}): use the "
            f"model's folder or hub id in transformers' own format"
        ) from error
    if hasattr(model.config, "quantization_config"):  # the weights are float32 now
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None  # type: ignore[assignment]
    for key, value in vars(model.config).items():  # float32 in the file: 9.999999974752427e-07 was written for 1e-06
        if isinstance(value, float) and float(numpy.float32(value)) == value:
            setattr(model.config, key, float(str(numpy.float32(value))))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
