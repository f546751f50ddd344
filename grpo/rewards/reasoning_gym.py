"""Reward and generator of reasoning-gym tasks: the task's own score of the answer. Needs the extra `reasoning-gym`.

Columns hold the address of an entry (task, seed, settings, index), not the entry: the generator makes it again, the
same to the last bit, in whatever process the reward runs.
"""

import functools
import json
from typing import Any

from grpo.errors import ConfigError
from grpo.rewards.registry import one_by_one, register_reward, text_of
from grpo.rewards.xml_format import lenient_answer

MISSING = "dataset reasoning_gym needs reasoning-gym, which is not installed: pip install reasoning-gym==0.1.25"


@functools.cache
def entries(task: str, size: int, seed: int, settings: str) -> Any:
    """Return the generator of a task's entries: entries(...)[index] -> {"question", "answer", "metadata"}.

    Args:
        task: Name of the task in reasoning-gym.
        size: Number of entries.
        seed: Seed of the entries.
        settings: Further settings of the task, as JSON.

    Raises:
        ConfigError: reasoning-gym is not installed, or does not know the task or a setting.
    """
    try:
        import reasoning_gym as gym
    except ImportError as error:
        raise ConfigError(MISSING) from error
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ConfigError(
            f"data.dataset_kwargs: reasoning-gym has no task '{task}', it has {', '.join(sorted(DATASETS))}"
        )
    try:
        return gym.create_dataset(task, size=size, seed=seed, **json.loads(settings))
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"data.dataset_kwargs: task '{task}' refuses its settings {settings}: {error}") from error


@register_reward("reasoning_gym")
@one_by_one(seconds=5.0, needs="reasoning_gym")
def reasoning_gym(completions: list[Any], entry: list[dict[str, Any]]) -> list[float | None]:
    """Return the task's own score, from 0 to 1, of the text in the last <answer> block, or of the whole text.

    Args:
        completions: The completions.
        entry: Address of the entry: task, size, seed, settings, index.
    """
    scores: list[float | None] = []
    for completion, place in zip(completions, entry, strict=True):
        source = entries(place["task"], place["size"], place["seed"], place["settings"])
        answer = lenient_answer(text_of(completion))
        scores.append(float(source.score_answer(answer, source[place["index"]])))
    return scores
