"""Dataset gsm8k: grade-school word problems."""

from grpo.config.schema import DataConfig
from grpo.data.files import BadRows, Table, read_table, table_of
from grpo.data.hub import load_split
from grpo.data.registry import Part, register_dataset


@register_dataset("gsm8k")
def gsm8k(data: DataConfig, part: Part, seed: int, bad: BadRows | None = None) -> Table:
    """Return rows of local files, or of openai/gsm8k on the hub, whose test split is held out."""
    if part == "train" and data.path is not None:
        return read_table(data.path, bad=bad)
    if part == "held_out" and data.eval_path is not None:
        return read_table(data.eval_path, "data.eval_path", bad)
    if part == "held_out" and data.path is not None:
        return table_of("held-out", [])
    return load_split("openai/gsm8k", "main", data.split if part == "train" else "test")
