"""The datasets that come with the trainer: gsm8k, question_answer, arithmetic, invented_language. Config -> Table of raw rows."""

import re
from pathlib import Path
from typing import Literal

from grpo.config.schema import DataConfig
from grpo.data.files import BadRows, Row, Table, read_table, table_of
from grpo.data.registry import register_dataset
from grpo.errors import ConfigError

Part = Literal["train", "held_out"]

ARITHMETIC_TRAIN_SIZE = 4000
ARITHMETIC_HELD_OUT_SIZE = 500
"""Where data.eval_size is null: the problems are made up, so "all" has no meaning."""

INVENTED_NOUNS = 60
"""As many as the small starter model can learn in its warm-up."""


@register_dataset("gsm8k")
def gsm8k(data: DataConfig, part: Part, seed: int, bad: BadRows | None = None) -> Table:
    """Grade-school word problems: from local files, or from the hub (openai/gsm8k, its test split is held out)."""
    if part == "train" and data.path is not None:
        return read_table(data.path, bad=bad)
    if part == "held_out" and data.eval_path is not None:
        return read_table(data.eval_path, "data.eval_path", bad)
    if part == "held_out" and data.path is not None:
        return table_of("held-out", [])
    return _from_hub("openai/gsm8k", "main", data.split if part == "train" else "test")


@register_dataset("question_answer")
def question_answer(data: DataConfig, part: Part, seed: int, bad: BadRows | None = None) -> Table:
    """Any questions and answers, or TRL prompts: a local file, a hub dataset (owner/name), a folder of data files."""
    if part == "held_out":
        if data.eval_path is not None:
            return _file_or_hub(data.eval_path, data, data.eval_split or data.split, "data.eval_path", bad)
        if data.eval_split is not None and data.path is not None:
            return _from_hub(data.path, data.subset, data.eval_split)
        return table_of("held-out", [])
    if data.path is None:
        raise ConfigError(
            "data.path is null, dataset 'question_answer' needs a JSONL, CSV or Parquet file there, or a hub dataset"
        )
    return _file_or_hub(data.path, data, data.split, "data.path", bad)


def is_hub_name(path: str) -> bool:
    """A folder of data files, or owner/name: for the hub's library. What ends like a data file is one."""
    name = re.fullmatch(r"[\w.-]+/[\w-][\w.-]*(?<!\.jsonl)(?<!\.csv)(?<!\.parquet)", path)
    return name is not None or Path(path).expanduser().is_dir()


def _file_or_hub(path: str, data: DataConfig, split: str, key: str, bad: BadRows | None) -> Table:
    """A path that ends like a data file is one; a folder, or owner/name, is for the hub's library."""
    if is_hub_name(path):
        return _from_hub(path, data.subset, split)
    return read_table(path, key, bad)


@register_dataset("arithmetic")
def arithmetic(data: DataConfig, part: Part, seed: int) -> Table:
    """Made-up problems, no download: 4000 to train on, and data.eval_size others."""
    from grpo.data.arithmetic import generate_problems

    held_out_size = ARITHMETIC_HELD_OUT_SIZE if data.eval_size is None else data.eval_size
    count = ARITHMETIC_TRAIN_SIZE if part == "train" else held_out_size
    rows: list[Row] = generate_problems(count, seed=seed, split=part)
    return table_of("arithmetic", rows)


@register_dataset("invented_language")
def invented_language(data: DataConfig, part: Part, seed: int) -> Table:
    """Questions and answers about a made-up language, no download: words in three wordings; a quarter of them held out."""
    from grpo.data.invented_language import generate_rows, make_lexicon

    rows = generate_rows(seed=seed, split=part, lexicon=make_lexicon(seed, INVENTED_NOUNS))
    return table_of("invented_language", rows)


def _from_hub(name: str, subset: str | None, split: str) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{name} is on the hub: pip install datasets, or set data.path to a local file") from error
    try:
        rows = datasets.load_dataset(name, subset, split=split).to_list()
    except Exception as error:  # The hub raises dozens of kinds; to the person they are one: it did not come.
        raise ConfigError(f"{name} ({split}) cannot be loaded: {error}; or set data.path to a local file") from error
    return table_of(f"{name} ({split})", rows)
