"""Findings about a config that need no weights: data, prompts, rewards, batch arithmetic, memory and time."""

import itertools
from datetime import datetime

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.schema import Config, flatten, to_dict
from grpo.data.card import check_permission
from grpo.data.duplicates import count_repeats
from grpo.data.files import BadRows
from grpo.data.rendering import check_template_kwargs, prompt_token_ids, prompts_token_ids, template_arguments
from grpo.data.rows import Example, extraction_report, load_examples
from grpo.data.streaming import peek
from grpo.data.training_data import too_few_prompts
from grpo.errors import ConfigError
from grpo.models.limits import Extent, check_limits
from grpo.models.strategies.base import Machine
from grpo.models.tiny import demonstration_notice
from grpo.rewards.scoring import RewardSum
from grpo.rollout.dialogue import check_turns, offer_tools
from grpo.rollout.engine import find_engine
from grpo.run.callbacks import build_callbacks
from grpo.run.checkpointer import find_checkpoint
from grpo.run.checks import check_resume, check_settings
from grpo.run.components import settings_without_effect
from grpo.runtime.run_lock import check_free
from grpo.tools.check_cost import describe_batch, least_operations, measure_matrix_rate, steps_of
from grpo.tools.check_examples import check_examples
from grpo.tools.check_result import Check, PromptCheck
from grpo.tools.check_rewards import check_rewards
from grpo.tools.check_turns import check_conversation, end_ids_of
from grpo.tools.memory import estimate
from grpo.tools.model_shape import check_reference, tokenizer_and_shape
from grpo.tools.red_team import search
from grpo.tracking.run_dir import choose_run_dir
from grpo.turns.sources import turn_sources

MEASURED_ROWS = 8_000
"""Prompts tokenised for the length statistics. Of a larger file, rows at equal distances are taken."""


def check(config: Config, machine: Machine | None = None, *, red_team: bool = False) -> Check:
    """Find out everything about a config that can be known before weights load.

    Args:
        config: The config.
        machine: The machine to estimate memory for; default: one CPU process.
        red_team: Search for completions that earn rewards without being right.

    Raises:
        ConfigError: `train` would refuse the config as well.
    """
    found = Check(config=flatten(to_dict(config)))
    check_settings(config)
    offer_tools(config)
    score = RewardSum(config.rewards, config.reward_kwargs)
    score.sources |= turn_sources(config)
    build_callbacks(config.callbacks)
    run_dir = choose_run_dir(config, datetime.now())
    found.run_dir = str(run_dir)
    check_free(run_dir)
    found.warnings += settings_without_effect(config)
    if notice := demonstration_notice(config):
        found.warnings.append(notice)
    permission = check_permission(config.data)
    if permission:
        found.warnings.append(permission)
    bad = BadRows(skip=config.data.bad_rows == "skip")
    streaming = config.data.streaming
    rows = peek(config.data, bad) if streaming else load_examples(config.data, "train", config.seed, bad)
    if not rows:
        raise ConfigError(f"data.name {config.data.name} gave no training rows")
    found.data, found.rejected = extraction_report(rows, config.data, len(bad.rejected)), bad.rejected
    if streaming:
        found.data += f" (data.streaming: only the first {len(rows):,} rows were read)"
    held_out = load_examples(config.data, "held_out", config.seed) if config.eval_every else []
    score.check_columns(set(rows[0].columns))
    checkpoint = find_checkpoint(config, run_dir)
    if checkpoint is not None:
        check_resume(config, checkpoint, run_dir, score, processes=None)
    tokenizer, model = tokenizer_and_shape(config, rows)
    check_reference(config, tokenizer, model)
    check_template_kwargs(tokenizer, config.data.chat_template_kwargs)
    if config.model.name != "starter":
        check_turns(config, tokenizer, end_ids_of(config, tokenizer))
    _check_questions(found, rows, held_out)
    extent = _check_lengths(found, config, rows, tokenizer)
    check_conversation(found, config, rows[0], tokenizer)
    _check_held_out_lengths(found, config, held_out, tokenizer)
    if config.model.name != "starter":
        needs_packing = find_engine(config.rollout.engine).needs_packed_attention
        check_limits(config, config.model.name, tokenizer, extent, needs_packed_attention=needs_packing)
    check_rewards(found, score, rows, tokenizer)
    check_examples(found, score, config.data, tokenizer)
    if red_team:
        found.red_team = search(score, rows, tokenizer, found.form)
        found.problems += found.red_team.problems
        found.warnings += found.red_team.warnings
    prompts = None if streaming else round(len(rows) * (1 - found.too_long / found.measured))
    if prompts is not None:
        found.warnings += too_few_prompts(prompts, config.prompts_per_step)
    found.batch, found.steps = describe_batch(config, prompts), steps_of(config, prompts)
    _estimate_cost(found, config, model, machine)
    return found


def _check_lengths(found: Check, config: Config, rows: list[Example], tokenizer: PreTrainedTokenizerBase) -> Extent:
    """Tokenise prompts: their lengths, those over the limit, and the first two as the model reads them.

    Returns:
        The extent of the prompts that are not left out.
    """
    measured = rows if len(rows) <= MEASURED_ROWS else rows[:: -(-len(rows) // MEASURED_ROWS)]
    messages = [row.messages for row in measured]
    arguments = [template_arguments(row.columns) for row in measured]
    blocks = [
        prompts_token_ids(messages[start : start + 1000], tokenizer, arguments[start : start + 1000])
        for start in range(0, len(messages), 1000)
    ]
    lengths = sorted(len(ids) for block in blocks for ids in block)
    found.measured = len(measured)
    found.lengths = {
        "shortest": lengths[0],
        "median": lengths[len(lengths) // 2],
        "95 %": lengths[min(len(lengths) - 1, len(lengths) * 95 // 100)],
        "max": lengths[-1],
    }
    for row in rows[:2]:
        ids = prompt_token_ids(row.messages, tokenizer, template_arguments(row.columns))
        answer = row.columns.get("answer")
        found.prompts.append(PromptCheck(str(tokenizer.decode(ids)), len(ids), None if answer is None else str(answer)))
    limit, extent = config.data.max_prompt_length, Extent()
    for ids in itertools.chain.from_iterable(blocks):
        if limit is None or len(ids) <= limit:
            extent.add(ids)
    if limit is None:
        return extent
    found.too_long = sum(length > limit for length in lengths)
    found.lengths["max"] = min(limit, lengths[-1])
    if found.too_long == len(lengths):
        raise ConfigError(
            f"data.max_prompt_length is {limit}, which leaves none of the {len(lengths)} prompts (the shortest has "
            f"{lengths[0]} tokens): raise it"
        )
    if found.too_long:
        of = "" if len(lengths) == len(rows) else f" of the {len(lengths):,} measured"
        found.warnings.append(f"{found.too_long}{of} prompts are longer than data.max_prompt_length {limit}: left out")
    return extent


def _check_held_out_lengths(
    found: Check, config: Config, rows: list[Example], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Count the held-out prompts over the limit, which are not evaluated."""
    limit = config.data.max_prompt_length
    if limit is None or not rows:
        return
    arguments = [template_arguments(row.columns) for row in rows]
    lengths = map(len, prompts_token_ids([row.messages for row in rows], tokenizer, arguments))
    too_long = sum(length > limit for length in lengths)
    if too_long:
        found.warnings.append(
            f"{too_long} of {len(rows)} held-out prompts are longer than data.max_prompt_length {limit}: not evaluated"
        )


def _check_questions(found: Check, rows: list[Example], held_out: list[Example]) -> None:
    """Count rows, repeated questions, and held-out questions that are trained on."""
    found.rows, found.held_out = len(rows), len(held_out)
    found.with_answer = sum(row.columns.get("answer") is not None for row in rows)
    repeats = count_repeats(rows, held_out)
    found.duplicates, found.overlap = repeats.repeated, repeats.known
    found.warnings += repeats.warnings()


def _estimate_cost(found: Check, config: Config, model: PreTrainedModel, machine: Machine | None) -> None:
    found.parameters = sum(parameter.numel() for parameter in model.parameters())
    found.memory = estimate(config, model, found.lengths["max"], machine or Machine())
    found.matrix_rate = measure_matrix_rate()
    operations = least_operations(config, found.parameters, found.lengths["median"])
    found.least_seconds_per_step = operations / found.matrix_rate
