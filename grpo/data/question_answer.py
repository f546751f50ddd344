"""Dataset question_answer: any questions and answers, or TRL prompts."""

from grpo.config.schema import DataConfig
from grpo.data.files import BadRows, Table, table_of
from grpo.data.hub import load_split, read_path
from grpo.data.registry import Part, check_files, register_dataset
from grpo.errors import ConfigError


@register_dataset("question_answer", check=check_files)
def question_answer(data: DataConfig, part: Part, seed: int, bad: BadRows | None = None) -> Table:
    """Return rows of a local file, a hub dataset (owner/name), or a folder of data files."""
    if part == "held_out":
        if data.eval_path is not None:
            return read_path(data.eval_path, data, data.eval_split or data.split, "data.eval_path", bad)
        if data.eval_split is not None and data.path is not None:
            return load_split(data.path, data.subset, data.eval_split)
        return table_of("held-out", [])
    if data.path is None:
        raise ConfigError(
            "data.path is null, dataset 'question_answer' needs a JSONL, CSV or Parquet file there, or a hub dataset"
        )
    return read_path(data.path, data, data.split, "data.path", bad)
