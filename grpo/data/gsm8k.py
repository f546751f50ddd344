"""Dataset gsm8k: grade-school word problems."""

from grpo.config.schema import DataConfig
from grpo.data.files import BadRows, Table
from grpo.data.hub import load_split
from grpo.data.question_answer import question_answer
from grpo.data.registry import Part, check_files, register_dataset


@register_dataset("gsm8k", check=check_files)
def gsm8k(data: DataConfig, part: Part, seed: int, bad: BadRows | None = None) -> Table:
    """Return the rows of data.path and data.eval_path, or of openai/gsm8k on the hub, whose test split is held out."""
    if data.path is not None or (part == "held_out" and data.eval_path is not None):
        return question_answer(data, part, seed, bad)
    return load_split("openai/gsm8k", "main", data.split if part == "train" else "test")
