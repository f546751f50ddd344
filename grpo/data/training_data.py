"""Training data: assemble the stream of prompts that training draws from, before any weight loads.

in memory    rows -> Examples -> list of Prompts                          small files, generated data
mapped       rows -> Examples -> Arrow file, written once -> mapped       large files (data.cache)
streamed     rows are read when they are drawn                            data.streaming
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from grpo.config.schema import Config
from grpo.data.card import check_permission
from grpo.data.curriculum import Curriculum
from grpo.data.files import BadRows
from grpo.data.mapped import MappedPrompts, UnstorableError, map_prompts, mapped_folder, open_mapped, wants_mapping
from grpo.data.rendering import check_template_kwargs, render_prompts
from grpo.data.rows import Example, extraction_report, load_examples
from grpo.data.stream import PromptStream
from grpo.data.streaming import StreamedPrompts, peek
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError
from grpo.rewards.scoring import RewardSum
from grpo.types import Prompt

log = logging.getLogger(__name__)


MIN_PROMPTS = 10
"""Fewer training prompts are reported."""


@dataclass
class TrainingData:
    """Prompts of a run, and the tokenizer that they were rendered with."""

    model_path: str
    tokenizer: Any
    stream: PromptStream | StreamedPrompts
    size: int | None
    """Prompts per epoch; None for streamed data, whose size is unknown."""
    rejected: list[dict[str, str]]
    """Rows that were left out, with place and reason."""


def training_data(
    config: Config,
    accelerator: Accelerator,
    score: RewardSum,
    model_path: Callable[[Config, list[Example], Accelerator], str],
) -> TrainingData:
    """Load the training prompts, and set config.steps where num_train_epochs is given.

    Args:
        score: The rewards, whose columns are checked.
        model_path: Returns the folder or hub id of the model. The tiny model is made from the examples.

    Raises:
        ConfigError: The data cannot be used.
    """
    data = config.data
    if warning := check_permission(data):
        log.info(warning)
    mapping = wants_mapping(data) and not data.streaming
    if mapping and config.model.name != "starter":  # the tiny model needs the rows in any case
        tokenizer = load_tokenizer(config.model.name, config.model.gguf_file)
        prompts = _find_mapped(mapped_folder(data, tokenizer), accelerator)
        if prompts is not None:
            score.check_columns(set(prompts.record["columns"]))
            log.info(f"data: {len(prompts)} prompts from {prompts.folder}, cached for this file and these settings")
            record = prompts.record
            path = model_path(config, [], accelerator)
            return _epochs(config, path, tokenizer, prompts, record["dropped"], record["rejected"])

    bad = BadRows(skip=data.bad_rows == "skip")
    examples = peek(data, bad) if data.streaming else load_examples(data, "train", config.seed, bad)
    if not examples:
        raise ConfigError(f"data.name {data.name} gave no training rows")
    log.info(extraction_report(examples, data, len(bad.rejected)))
    score.check_columns(set(examples[0].columns))
    path = model_path(config, examples, accelerator)
    tokenizer = load_tokenizer(path, config.model.gguf_file)
    check_template_kwargs(tokenizer, data.chat_template_kwargs)
    if data.streaming:
        render_prompts(examples, tokenizer, data.max_prompt_length)  # raises if all of the first ones are too long
        return TrainingData(path, tokenizer, StreamedPrompts(data, tokenizer, config.seed), None, [])
    if mapping:
        prompts = _make_mapped(config, examples, tokenizer, bad, accelerator)
    if mapping and prompts is not None:
        return _epochs(config, path, tokenizer, prompts, prompts.record["dropped"], bad.rejected)
    rendered, dropped = render_prompts(examples, tokenizer, data.max_prompt_length)
    return _epochs(config, path, tokenizer, rendered, dropped, bad.rejected)


def _find_mapped(folder: Path, accelerator: Accelerator) -> MappedPrompts | None:
    """Open the cached prompts on every process, after the main process has checked them."""
    found = open_mapped(folder) if accelerator.is_main_process else None
    if broadcast_object_list([found is not None])[0] and found is None:
        found = open_mapped(folder)
    return found


def _make_mapped(
    config: Config, examples: list[Example], tokenizer: Any, bad: BadRows, accelerator: Accelerator
) -> MappedPrompts | None:
    """Write the prompts to the cache on the main process, unless they are there, and open them on every process.

    Returns None on every process where the cache cannot be written: the prompts are kept in memory then.
    """
    folder = mapped_folder(config.data, tokenizer)
    prompts = open_mapped(folder) if accelerator.is_main_process else None
    if prompts is None and accelerator.is_main_process:
        try:
            prompts = map_prompts(folder, examples, tokenizer, config.data.max_prompt_length, bad.rejected)
        except OSError as error:
            log.warning("data.cache: cannot write %s: %s. The prompts are kept in memory", folder, error)
        except UnstorableError as error:
            if config.data.cache == "always":
                raise
            log.info("%s. The prompts are kept in memory", str(error).partition(": set ")[0])
    if not broadcast_object_list([prompts is not None])[0]:
        return None
    prompts = prompts or open_mapped(folder)
    if prompts is None:
        raise ConfigError(f"data.cache: {folder} cannot be read on every process: set GRPO_CACHE to a shared folder")
    return prompts


def too_few_prompts(count: int, prompts_per_step: int) -> list[str]:
    """Return a line about data that is too small to learn more from than these rows, otherwise none."""
    if count >= max(MIN_PROMPTS, prompts_per_step):
        return []
    again = (
        f", and draws some of them more than once in each step of {prompts_per_step}"
        if count < prompts_per_step
        else ""
    )
    return [
        f"the data has only {count} training prompt{'s' if count != 1 else ''}: the model will learn "
        f"{'them' if count != 1 else 'it'} by heart{again}. Add rows: some hundreds are usual"
    ]


def _epochs(
    config: Config,
    path: str,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    dropped: int,
    rejected: list[dict[str, str]],
) -> TrainingData:
    """Build the stream over prompts that are all known."""
    if dropped:
        log.info(f"{dropped} prompts are longer than data.max_prompt_length {config.data.max_prompt_length}: left out")
    for line in too_few_prompts(len(prompts), config.prompts_per_step):
        log.warning(line)
    if config.num_train_epochs is not None:
        config.steps = math.ceil(config.num_train_epochs * len(prompts) / config.prompts_per_step)
    rule = config.curriculum
    if rule.reward is None:
        stream = PromptStream(prompts, config.seed, shuffle=config.data.shuffle_dataset)
    else:
        stream = Curriculum(
            prompts,
            config.seed,
            solved=rule.solved,
            hopeless=rule.hopeless,
            patience=rule.patience,
            return_after=rule.return_after,
        )
    return TrainingData(path, tokenizer, stream, len(prompts), rejected)
