"""Dataset reasoning_gym: generated questions of a task of reasoning-gym. Needs the extra `reasoning-gym`.

--data.name reasoning_gym --data.dataset_kwargs '{task: chain_sum}' --rewards '{reasoning_gym: 1.0}'

question   State the final answer to the following arithmetic problem: 4 + 3 =
answer     7
entry      {"task": "chain_sum", "size": 1000, "seed": 42, "settings": "{}", "index": 0}
"""

import json
from collections.abc import Mapping
from typing import Any

from grpo.config.schema import DataConfig
from grpo.data.prompts import messages_for
from grpo.data.registry import Part, check_generated, register_dataset
from grpo.data.rows import Example
from grpo.rewards.reasoning_gym import entries

HELD_OUT_SEED = 2**31
"""Added to the seed of the run for the held-out questions."""
HELD_OUT_SIZE = 500


@register_dataset("reasoning_gym", check=check_generated)
def reasoning_gym(
    data: DataConfig,
    part: Part,
    seed: int,
    *,
    task: str,
    size: int = 1000,
    settings: Mapping[str, Any] | None = None,
) -> list[Example]:
    """Return questions of one task, without a download. No question is in both parts.

    Args:
        data: The config.
        part: train or held_out.
        seed: Seed of the run.
        task: Name of the task in reasoning-gym.
        size: Number of training questions, less those that are held out.
        settings: Further settings of the task, for example its difficulty.

    Raises:
        ConfigError: reasoning-gym is not installed, or does not know the task or a setting.
    """
    held_out_size = HELD_OUT_SIZE if data.eval_size is None else data.eval_size
    given = json.dumps(dict(settings or {}), sort_keys=True)
    held_out = _examples(data, task, held_out_size, seed + HELD_OUT_SEED, given)
    if part == "held_out":
        return held_out
    known = {example.columns["question"] for example in held_out}
    return [one for one in _examples(data, task, size, seed, given) if one.columns["question"] not in known]


def _examples(data: DataConfig, task: str, size: int, seed: int, settings: str) -> list[Example]:
    source = entries(task, size, seed, settings)
    place = {"task": task, "size": size, "seed": seed, "settings": settings}
    examples = []
    for index in range(size):
        entry = source[index]
        question, answer = str(entry["question"]), None if entry["answer"] is None else str(entry["answer"])
        columns = {"question": question, "answer": answer, "entry": {**place, "index": index}}
        examples.append(Example(messages_for(question, data), columns))
    return examples
