"""Registry of datasets, apart from the datasets, so that one dataset's file can import it without the others."""

from collections.abc import Callable
from typing import Any, Literal

from grpo.registry import Registry

Part = Literal["train", "held_out"]

DatasetFunction = Callable[..., Any]
"""f(data: DataConfig, part: Part, seed: int) -> rows (dicts), a Table of rows, or Examples. A fourth parameter `bad`
gets the BadRows that collects rejected rows."""

DATASETS: Registry[DatasetFunction] = Registry("dataset", package="grpo.data")
register_dataset = DATASETS.register
