"""Registry of datasets, apart from the datasets, so that one dataset's file can import it without the others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from grpo.config.schema import Config, DataConfig
from grpo.errors import ConfigError
from grpo.registry import Registry

Part = Literal["train", "held_out"]

DatasetFunction = Callable[..., Any]
"""f(data: DataConfig, part: Part, seed: int) -> rows (dicts), a Table of rows, or Examples. A fourth parameter `bad`
gets the BadRows that collects rejected rows."""

DATASETS: Registry[DatasetFunction] = Registry("dataset", package="grpo.data")
register_dataset = DATASETS.register


def check_generated(config: Config) -> None:
    """Raise ConfigError for settings that a dataset without files would ignore."""
    _refuse_ignored(
        config.data,
        ("path", "eval_path", "subset", "split", "eval_split", "streaming"),
        f"dataset '{config.data.name}' generates its rows",
        "remove it, or set data.name question_answer",
    )


def check_files(config: Config) -> None:
    """Raise ConfigError for settings of hub datasets beside a local file."""
    data = config.data
    if data.path is not None and Path(data.path).expanduser().is_file():
        _refuse_ignored(
            data, ("subset", "split", "eval_split"), "data.path is a file, which has no splits", "remove it"
        )


def _refuse_ignored(data: DataConfig, names: tuple[str, ...], reason: str, remedy: str) -> None:
    for name in names:
        value = getattr(data, name)
        if value != getattr(DataConfig(), name):
            raise ConfigError(f"data.{name} is {value}, but {reason}, so it would be ignored: {remedy}")
