"""Datasets on the Hugging Face Hub, and folders of data files: everything that the `datasets` library loads."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.config.schema import DataConfig
from grpo.data.files import DATA_ENDINGS, BadRows, Row, Table, read_table, table_of
from grpo.errors import ConfigError


def is_hub_name(path: str) -> bool:
    """Return whether `path` is a folder, or owner/name without the ending of a data file. An existing file is none."""
    local = Path(path).expanduser()
    if local.exists():
        return local.is_dir()
    return re.fullmatch(r"[\w.-]+/[\w-][\w.-]*", path) is not None and not path.lower().endswith(DATA_ENDINGS)


def read_path(path: str, data: DataConfig, split: str, key: str, bad: BadRows | None) -> Table:
    """Read a local file, or a split of a hub dataset or folder.

    Args:
        key: Config key to name in errors.
    """
    return load_split(path, data.subset, split) if is_hub_name(path) else read_table(path, key, bad)


def load_split(name: str, subset: str | None, split: str) -> Table:
    """Load one split whole.

    Raises:
        ConfigError: `datasets` is not installed, or the split cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{name} is on the hub: pip install datasets, or set data.path to a local file") from error
    try:
        rows = datasets.load_dataset(name, subset, split=split).to_list()
    except Exception as error:  # the library raises dozens of kinds, all of which mean that loading failed
        raise ConfigError(f"{name} ({split}) cannot be loaded: {error}; or set data.path to a local file") from error
    return table_of(f"{name} ({split})", rows)


def stream_split(name: str, subset: str | None, split: str) -> Iterator[tuple[Row, str]]:
    """Yield the rows of one split with their places, one by one. Raises ConfigError as `load_split` does."""
    import datasets

    try:
        rows: Any = datasets.load_dataset(name, subset, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield row, f"{name} ({split}), row {number}"
    except Exception as error:  # as in load_split
        raise ConfigError(f"data.path {name} ({split}) cannot be streamed: {error}") from error
