"""Training data: config -> the stream of prompts that training draws from, checked before any weight loads.

in memory    rows -> Examples -> list of Prompts                       small files, generated data
mapped       rows -> Examples -> an Arrow file, made once -> mapped    large files (data.cache)
streamed     rows are read when they are drawn                         data.streaming
"""

import logging
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from grpo.config.schema import Config
from grpo.data.card import check_permission
from grpo.data.curriculum import Curriculum
from grpo.data.mapped import MappedPrompts, map_prompts, mapped_folder, open_mapped, wants_mapping
from grpo.data.rows import BadRows, Example, extraction_report, load_examples
from grpo.data.stream import PromptStream, render_prompts
from grpo.data.streaming import StreamedPrompts, peek
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError
from grpo.rewards.scoring import RewardSum
from grpo.types import Prompt

log = logging.getLogger(__name__)


@dataclass
class TrainingData:
    """What `prepare` needs of the data."""

    model_path: str
    tokenizer: Any
    stream: PromptStream | StreamedPrompts
    size: int | None
    """Prompts of one epoch; None for a stream, which does not know."""
    rejected: list[dict[str, str]]
    """The rows that were left out, each with its place and the reason."""


def training_data(
    config: Config,
    accelerator: Accelerator,
    score: RewardSum,
    model_path: Callable[[Config, list[Example], Accelerator], str],
) -> TrainingData:
    """Find or make the prompts. Sets config.steps where num_train_epochs decides. Raises ConfigError."""
    data = config.data
    warning = check_permission(data)
    if warning:
        log.info(warning)
    bad = BadRows(skip=data.bad_rows == "skip")
    found: MappedPrompts | None = None
    mapping = wants_mapping(data) and not data.streaming
    if mapping and config.model.name != "starter":  # the starter is made from the rows: they are read in any case
        tokenizer = load_tokenizer(config.model.name, config.model.gguf_file)
        if accelerator.is_main_process:
            found = open_mapped(mapped_folder(data, tokenizer))
        if broadcast_object_list([found is not None])[0] and found is None:
            found = open_mapped(mapped_folder(data, tokenizer))
    if found is not None:
        score.check_columns(set(found.record["columns"]))
        log.info("data: %d prompts from %s, made earlier from this file and these settings", len(found), found.folder)
        return _finish(config, config.model.name, tokenizer, found, found.record["dropped"], found.record["rejected"])

    examples = peek(data, bad) if data.streaming else load_examples(data, "train", config.seed, bad)
    if not examples:
        raise ConfigError(f"data.name {data.name} gave no training rows")
    log.info(extraction_report(examples, data, len(bad.rejected)))
    score.check_columns(set(examples[0].columns))
    path = model_path(config, examples, accelerator)
    tokenizer = load_tokenizer(path, config.model.gguf_file)
    if data.streaming:
        render_prompts(examples, tokenizer, data.max_prompt_length)  # is any of the first ones short enough?
        return TrainingData(path, tokenizer, StreamedPrompts(data, tokenizer, config.seed), None, [])
    if not mapping:
        prompts, dropped = render_prompts(examples, tokenizer, data.max_prompt_length)
        return _finish(config, path, tokenizer, prompts, dropped, bad.rejected)
    folder = mapped_folder(data, tokenizer)
    made = open_mapped(folder) if accelerator.is_main_process else None
    if made is None and accelerator.is_main_process:
        made = map_prompts(folder, examples, tokenizer, data.max_prompt_length, bad.rejected)
    accelerator.wait_for_everyone()
    made = made or open_mapped(folder)
    if made is None:
        raise ConfigError(f"data.cache: {folder} cannot be read on every process: set GRPO_CACHE to a shared folder")
    return _finish(config, path, tokenizer, made, made.record["dropped"], bad.rejected)


def repeated_prompts(prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[str]:
    """A warning for questions that are asked twice, and for held-out ones that are trained on. Compared in NFC, without regard
    to spaces."""
    asked = [_question(prompt) for prompt in prompts]
    trained, warnings = set(asked), []
    if twice := len(asked) - len(trained):
        warnings.append(f"warning: {twice} of {len(asked)} training prompts repeat another one")
    if known := sum(_question(prompt) in trained for prompt in held_out):
        warnings.append(
            f"warning: {known} of {len(held_out)} held-out questions are among the training prompts: eval/accuracy shows what was "
            f"learned by heart as well. Give another data.eval_path"
        )
    return warnings


def _question(prompt: Prompt) -> str:
    text = prompt.messages if isinstance(prompt.messages, str) else prompt.messages[-1]["content"]
    return " ".join(unicodedata.normalize("NFC", text).split())


def _finish(
    config: Config, path: str, tokenizer: Any, prompts: Sequence[Prompt], dropped: int, rejected: list
) -> TrainingData:
    if dropped:
        limit = config.data.max_prompt_length
        log.info("%d prompts are longer than data.max_prompt_length %s: left out", dropped, limit)
    if config.num_train_epochs is not None:
        config.steps = math.ceil(config.num_train_epochs * len(prompts) / config.prompts_per_step)
    stream = PromptStream(prompts, config.seed)
    if config.curriculum.reward is not None:
        rule = config.curriculum
        stream = Curriculum(
            prompts,
            config.seed,
            solved=rule.solved,
            hopeless=rule.hopeless,
            patience=rule.patience,
            return_after=rule.return_after,
        )
    return TrainingData(path, tokenizer, stream, len(prompts), rejected)
