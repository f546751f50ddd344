"""Contents of what a run is made from: data, base model and reference -> sha256, compared on resume.

The settings name them, and a name may hold something else by then: answers were corrected, a folder was overwritten.

    {"data": "5c0f...", "held_out": "...", "base": "...", "reference": "..."}
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grpo.config.schema import Config
from grpo.data.mapped import MappedPrompts
from grpo.data.stream import PromptStream
from grpo.data.training_data import TrainingData
from grpo.errors import ConfigError
from grpo.types import Prompt

log = logging.getLogger(__name__)

WHOLE_BYTES = 2 * 10**9
"""Models up to this size are read whole. Of larger ones, PIECE bytes in each STRIDE are read."""
PIECE, STRIDE = 1 << 16, 1 << 22
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def contents_of(config: Config, data: TrainingData, held_out: Iterable[Prompt]) -> dict[str, str]:
    """Return the sha256 of everything that can be read again at a resume, by name."""
    found = {
        "data": _data(config, data),
        "held_out": hash_prompts(held_out),
        "base": hash_model(data.model_path, config.model.gguf_file),
        "reference": hash_model(config.model.reference) if config.model.reference is not None else None,
    }
    return {name: sha256 for name, sha256 in found.items() if sha256 is not None}


def check_contents(before: Mapping[str, str], now: Mapping[str, str], config: Config) -> list[str]:
    """Return a warning for data that has changed since the checkpoint was written.

    Raises:
        ConfigError: The base of an adapter or of the KL term, or the reference, has changed: the checkpoint does not
            hold its weights.
    """
    changed = [name for name in now if name in before and before[name] != now[name]]
    objective, model = config.objective, config.model
    base_is_used = config.lora.r is not None or (objective.beta > 0 and model.reference is None)
    for name, key, value, used in (
        ("base", "model.name", model.name, base_is_used and model.name != "starter"),
        ("reference", "model.reference", model.reference, objective.beta > 0 and model.reference),
    ):
        if name in changed and used and key not in config.allow_changes:
            raise ConfigError(
                f"resume: the weights of {key} '{value}' have changed since the checkpoint was written (sha256 "
                f"{before[name][:12]} -> {now[name][:12]}): that would be another run. Put them back, or go on with "
                f"--allow_changes '[{key}]'"
            )
    texts = {
        "data": "the training data has changed since the checkpoint was written: further steps use the new rows",
        "held_out": "the held-out rows have changed since the checkpoint was written: evaluations before and after "
        "cannot be compared",
        "base": "the model that training started from has changed since the checkpoint was written; the trained "
        "weights are those of the checkpoint",
        "reference": "the reference has changed since the checkpoint was written",
    }
    return [f"resume: {texts[name]} (sha256 {before[name][:12]} -> {now[name][:12]})" for name in changed]


def _data(config: Config, data: TrainingData) -> str | None:
    if isinstance(data.stream, PromptStream):
        prompts = data.stream.prompts
        if isinstance(prompts, MappedPrompts):  # its name is made from the file and the settings
            return hashlib.sha256(prompts.folder.name.encode()).hexdigest()
        return hash_prompts(prompts)
    path = Path(config.data.path or "").expanduser()
    return hash_files([path]) if config.data.path and path.is_file() else None


def hash_prompts(prompts: Iterable[Prompt]) -> str | None:
    """Return the sha256 of the prompts with their columns, in their order; None without prompts."""
    digest, count = hashlib.sha256(), 0
    for prompt in prompts:
        count += 1
        content = [prompt.messages, list(prompt.token_ids), prompt.columns]
        digest.update(json.dumps(content, sort_keys=True, default=_kind).encode("utf-8", "surrogatepass"))
    return digest.hexdigest() if count else None


def hash_model(path: str, gguf_file: str | None = None) -> str | None:
    """Return the sha256 of a GGUF or of the weights in a folder, or the commit of a model on the hub.

    None: none of them can be read.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        return hash_files([folder])
    if folder.is_dir():
        files = [folder / gguf_file] if gguf_file else [file for file in folder.iterdir() if file.suffix in _WEIGHTS]
        return hash_files(sorted(files))
    from transformers import AutoConfig

    try:
        commit = getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "_commit_hash", None)
    except (OSError, ValueError):
        return None
    return hashlib.sha256(str(commit).encode()).hexdigest() if commit else None


def hash_files(files: list[Path]) -> str | None:
    """Return one sha256 of several files. Of more than WHOLE_BYTES, evenly spaced pieces are read."""
    digest = hashlib.sha256()
    try:
        sizes = [file.stat().st_size for file in files]
        step = STRIDE if sum(sizes) > WHOLE_BYTES else PIECE
        for path, size in zip(files, sizes, strict=True):
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for position in range(0, size, step):
                    file.seek(position)
                    digest.update(file.read(PIECE))
    except OSError:
        return None
    return digest.hexdigest() if files else None


def _kind(value: Any) -> str:
    """Return a text for a value that JSON cannot hold: equal in each process, unlike its repr."""
    return type(value).__name__
