"""The dataset registry, apart from the datasets, so that one dataset's file can import it without the others."""

from collections.abc import Callable
from typing import Any

from grpo.registry import Registry

DatasetFunction = Callable[..., Any]
"""f(data: DataConfig, part: "train" | "held_out", seed: int) -> rows (dicts), a Table of rows, or Examples."""

DATASETS: Registry[DatasetFunction] = Registry("dataset")
register_dataset = DATASETS.register
