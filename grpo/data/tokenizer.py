"""Tokenizer loading from a local folder or the hub."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo.data.gguf import plain_model
from grpo.errors import ConfigError

_live: dict[str, PreTrainedTokenizerBase] = {}
"""Path -> the tokenizer in memory that is used instead of the one there."""


@contextlib.contextmanager
def live_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Let `tokenizer` be the one of `path` within."""
    _live[path] = tokenizer
    try:
        yield
    finally:
        del _live[path]


def load_tokenizer(path: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        path: Local folder, hub id, or GGUF file.
        gguf_file: GGUF file in that folder or repository.

    Raises:
        ConfigError: It is missing, cannot be loaded, or encodes every text as nothing.
    """
    if path in _live:
        return _live[path]
    check_exists(path)
    folder = plain_model(path, gguf_file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    except (OSError, ValueError) as error:
        check_has_model(path, folder)
        raise ConfigError(f"model.name '{path}': its tokenizer cannot be loaded: {error}") from error
    if not tokenizer.encode("1 + 1 = 2", add_special_tokens=False):  # transformers falls back to an empty one
        raise ConfigError(
            f"model.name '{path}': its tokenizer cannot be loaded: without tokenizer.json (or a vocabulary file) it "
            f"encodes every text as nothing. Copy the tokenizer's files from the model that this one was trained from"
        )
    return tokenizer


def check_exists(path: str) -> None:
    """Raise ConfigError for a local path that does not exist, which transformers would look for on the hub.

    A hub id has one slash at most: outputs/first/final is a path.
    """
    local = Path(path).is_absolute() or path.startswith(".") or path.strip("/").count("/") > 1
    if local and not path.endswith(".gguf") and not Path(path).exists():
        raise ConfigError(f"model.name '{path}' cannot be loaded: there is no such folder")


def check_has_model(path: str, folder: str) -> None:
    """Raise ConfigError for a folder without config.json. `path` is the name in the config, for the message."""
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        hint = "copy it again, or save the model again"
        if (Path(folder) / "adapter_config.json").is_file():
            hint = "it holds an adapter; merge it: python launch/export.py --run RUN --format merged"
        raise ConfigError(f"model.name '{path}' cannot be loaded: the folder holds no config.json: {hint}")
