"""Build: a config -> the run, checked in the order of cost: config, data, rewards, then weights."""

import contextlib
import itertools
import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from grpo.config.schema import Config, RolloutConfig
from grpo.data.card import record_card
from grpo.data.duplicates import count_repeats
from grpo.data.gguf import gguf_path
from grpo.data.mapped import token_ids_of
from grpo.data.prompts import shown_examples
from grpo.data.rendering import render_prompts
from grpo.data.rows import Example, load_examples
from grpo.data.stream import PromptStream
from grpo.data.training_data import TrainingData, training_data
from grpo.experience import ExperienceCollector
from grpo.kernels.registry import report
from grpo.models.limits import Extent, check_limits
from grpo.models.strategies.registry import start_accelerator
from grpo.models.weights import save_dtype
from grpo.policy import Policy
from grpo.rewards.registry import reward_labels
from grpo.rewards.scoring import RewardSum
from grpo.rewards.sources import source_label
from grpo.rewards.workers import RewardWorkerPool
from grpo.rewards.xml_format import only_answer
from grpo.rollout.async_sampler import AsyncSampler
from grpo.rollout.dialogue import build_turns, check_turns, offer_tools
from grpo.rollout.engine import (
    RolloutEngine,
    build_engine,
    correction_of,
    end_token_ids,
    find_engine,
    longest_of,
    saved_end_ids,
    step_completions,
)
from grpo.rollout.logprob_mismatch import check_agreement, verify_weight_sync
from grpo.rollout.turn_rounds import with_turns
from grpo.run.best import find_best
from grpo.run.callbacks import Callback, Callbacks, State, build_callbacks
from grpo.run.checkpoint import check_free_space
from grpo.run.checkpointer import Checkpointer, ResumePoint, find_checkpoint, restore
from grpo.run.checks import check_resume, check_settings
from grpo.run.claim import claim_run_dir, warn_of_slow_saves
from grpo.run.components import settings_without_effect
from grpo.run.contents import check_contents, contents_of
from grpo.run.records import Recorder
from grpo.run.state import Run
from grpo.runtime.device import attention_backends, device_kind, free_memory, is_cpu, matmul_note
from grpo.runtime.distributed import max_over_ranks, run_on_main
from grpo.runtime.precision import compute_dtype, precision_of
from grpo.runtime.run_lock import check_free
from grpo.tracking.console import Display, show_messages
from grpo.tracking.diagnostics import Diagnostics, patience_for
from grpo.tracking.run_dir import choose_run_dir, fingerprint
from grpo.tracking.run_logger import RunLogger
from grpo.turns.sources import turn_sources
from grpo.types import Prompt, SamplingPlan

log = logging.getLogger(__name__)

LITTLE_MEMORY = 2 * 2**30
SMALL_BATCH = 2048
"""Tokens per batch where less than LITTLE_MEMORY bytes are free on a CPU."""


def build_run(config: Config) -> Run:
    """Build the run that `config` describes.

    Raises:
        ConfigError: Before any weight loads, for whatever can be known by then.
    """
    check_settings(config)
    offer_tools(config)
    config.data.examples = shown_examples(config.data)  # recorded with the run, whatever becomes of the file
    rewards = build_rewards(config)
    rewards.sources |= turn_sources(config)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(rewards.close)
        run = _build(config, rewards, on_failure)
        on_failure.pop_all()
    return run


def _build(config: Config, rewards: RewardSum, on_failure: contextlib.ExitStack) -> Run:
    callbacks = build_callbacks(config.callbacks)
    accelerator, run_dir = start_processes(config)
    show_messages()
    for line in settings_without_effect(config):
        log.warning(line)
    held_out_rows = load_examples(config.data, "held_out", config.seed) if config.eval_every else []
    before = fingerprint(run_dir)
    checkpoint = find_checkpoint(config, run_dir)
    data = training_data(config, accelerator, rewards, model_path)
    if checkpoint is not None:
        saved = check_resume(config, checkpoint, run_dir, rewards, accelerator.num_processes)
    held_out = held_out_prompts(config, held_out_rows, data)
    check_turns(config, data.tokenizer, saved_end_ids(data.model_path, data.tokenizer, config.model.gguf_file))
    check_limits(
        config,
        data.model_path,
        data.tokenizer,
        extent_of(data, held_out),
        needs_packed_attention=find_engine(config.rollout.engine).needs_packed_attention,
    )
    contents = run_on_main(accelerator, lambda: contents_of(config, data, held_out))
    for line in check_contents(saved["contents"], contents, config) if checkpoint is not None else []:
        log.warning(line)
    rewards.start()

    policy = build_policy(config, accelerator, data.model_path)
    point = ResumePoint(beta=config.objective.beta)
    if checkpoint is not None:
        point = restore(checkpoint, config, policy, data.stream)
    policy.check()
    policy.refresh_sampler()
    engine = build_checked_engine(config, accelerator, policy, data.tokenizer)
    turns = build_turns(config, data.tokenizer, end_token_ids(policy.sampler, data.tokenizer))
    if turns is not None:
        on_failure.callback(turns.close)
    engine = with_turns(engine, turns)
    sampler = build_sampler(config, accelerator, engine, rewards, point)
    collector = ExperienceCollector(
        config, accelerator, policy, sampler, data.stream, rewards, prompts_drawn=point.prompts_drawn
    )
    collector.load_limits(point.limits)
    collector.tokens_per_batch = batch_for_memory(collector.tokens_per_batch, longest_of(config), accelerator)
    sizes = policy.bytes_on_disk()
    if accelerator.is_main_process:
        check_free_space(run_dir, *sizes, config.save_total_limit)
    run_dir, lock = claim_run_dir(config, run_dir, before, accelerator)
    tracker = None
    if lock is not None:
        on_failure.callback(lock.release)
        tracker = start_records(config, run_dir, data, rewards, point.start, contents)
        warn_of_slow_saves(run_dir, sizes[0])
    log.info(summary_line(config, accelerator, data, held_out))
    recorder = build_recorder(config, policy, data.tokenizer, run_dir, tracker, callbacks, point)
    parts = (run_dir, config, accelerator, policy, collector, lambda: (recorder.first_eval, recorder.last_eval))
    checkpointer = Checkpointer(*parts, start=point.start, beta=point.beta, lock=lock, contents=contents)
    dtype = save_dtype(config, data.model_path)
    state = (held_out, recorder, checkpointer, point.start, point.beta, lock, dtype)
    best = find_best(config, accelerator, run_dir, point.start)
    return Run(config, accelerator, run_dir, policy, data.tokenizer, engine, collector, *state, best=best)


def batch_for_memory(tokens: int, longest: int | None, accelerator: Accelerator) -> int:
    """Return `tokens` per batch, or less on a CPU with little free memory, as in a small container. Collective.

    A container's limit ends the process: there is no error that an update could survive with smaller batches.

    Args:
        tokens: What is configured, or was lowered to.
        longest: Tokens of the longest possible prompt with a completion, which must fit. None: unknown.
    """
    smaller = tokens if longest is None else max(SMALL_BATCH, longest)
    little = is_cpu(accelerator.device) and free_memory(accelerator.device) < LITTLE_MEMORY
    if not max_over_ranks(accelerator, little) or tokens <= smaller:
        return tokens
    log.warning(
        "less than %.0f GiB of memory are free: batches of %d tokens instead of tokens_per_batch %d; the result is the "
        "same up to rounding",
        *(LITTLE_MEMORY / 2**30, smaller, tokens),
    )
    return smaller


def build_rewards(config: Config) -> RewardSum:
    """Return the rewards, in worker processes unless scoring.workers is 0. Raises ConfigError for an unknown name."""
    if config.scoring.workers == 0:
        return RewardSum(config.rewards, config.reward_kwargs)
    scoring = config.scoring
    return RewardWorkerPool(
        config.rewards, scoring.deadline, scoring.on_error, scoring.workers, kwargs=config.reward_kwargs
    )


def start_processes(config: Config) -> tuple[Accelerator, Path]:
    """Return the accelerator and the run directory, which no other run uses. The same on every process."""
    accelerator = start_accelerator(config.rank_timeout)
    run_dir = broadcast_object_list([choose_run_dir(config, datetime.now())])[0]
    if accelerator.is_main_process:
        check_free(run_dir)
    find_engine(config.rollout.engine).check_environment(config, accelerator.num_processes)
    return accelerator, run_dir


def extent_of(data: TrainingData, held_out: list[Prompt]) -> Extent:
    """Return the longest prompt and the largest token id, of all prompts that are in memory or mapped."""
    extent = Extent()
    known = data.stream.prompts if isinstance(data.stream, PromptStream) else []
    for prompt in itertools.chain(token_ids_of(known), (prompt.token_ids for prompt in held_out)):
        extent.add(prompt)
    return extent


def held_out_prompts(config: Config, rows: list[Example], data: TrainingData) -> list[Prompt]:
    """Return the prompts of the evaluation. Warns of those that are left out, and of those that are also trained on."""
    limit = config.data.max_prompt_length
    held_out, too_long = render_prompts(rows, data.tokenizer, limit) if rows else ([], 0)
    if too_long:
        log.warning(
            "%d of %d held-out prompts are longer than data.max_prompt_length %s tokens, and are not evaluated",
            *(too_long, len(rows), limit),
        )
    if isinstance(data.stream, PromptStream) and isinstance(data.stream.prompts, list):  # large files: launch/check.py
        for line in count_repeats(data.stream.prompts, held_out).warnings():
            log.warning(line)
    return held_out


def model_path(config: Config, rows: list[Example], accelerator: Accelerator) -> str:
    """Return the folder, hub id or GGUF to load. For "starter", the main process makes the folder first."""
    if config.model.name != "starter":
        return str(gguf_path(config.model.name, config.model.gguf_file) or config.model.name)
    from grpo.models.tiny import tiny_model_for

    path = str(tiny_model_for(config, rows)) if accelerator.is_main_process else ""
    return broadcast_object_list([path])[0]


def build_policy(config: Config, accelerator: Accelerator, path: str) -> Policy:
    """Load the weights of `path` for training."""
    torch.manual_seed(config.seed)
    return Policy(
        accelerator,
        path,
        config.model,
        config.objective,
        config.optimizer,
        config.lora,
        temperature=config.sampling.temperature,
        optimizer_steps=config.optimizer_steps,
        separate_sampler=config.rollout.max_staleness > 0,
        sampled_elsewhere=find_engine(config.rollout.engine).has_own_weights,
    )


def build_checked_engine(
    config: Config, accelerator: Accelerator, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> RolloutEngine:
    """Build the engine and verify that it samples from the policy: its weights follow, and its logprobs agree."""
    with accelerator.autocast():
        engine = build_engine(
            config.rollout.engine,
            policy.sampler,
            tokenizer,
            slots=config.rollout.slots,
            uses_packed_attention=policy.uses_packed_attention,
            config=config.rollout,
            accelerator=accelerator,
            weights=policy.sampler_weights,
            longest=longest_of(config),
            step_completions=step_completions(config, accelerator.num_processes),
            cache_gib=config.rollout.cache_gib,
            engine_kwargs=config.rollout.engine_kwargs,
        )
    if engine.has_own_weights:
        verify_weight_sync(engine, policy, config)
        if config.lora.r is not None and compute_dtype(accelerator) is not None:
            log.info(merged_adapter_line(config.rollout))
    with accelerator.autocast():  # on which the dtype of the cache depends
        log.info(kernels_line(accelerator, engine))
    check_agreement(engine, policy, config.sampling.temperature, config.rollout.max_logprob_difference)
    return engine


def kernels_line(accelerator: Accelerator, engine: RolloutEngine) -> str:
    """Return what the log says of kernels, dtypes and the backend of collectives."""
    dtype = str(compute_dtype(accelerator) or torch.float32).removeprefix("torch.")
    allowed = attention_backends(accelerator.device)
    backend = matmul_note() + (f"; torch's attention: {', '.join(allowed)}" if allowed else "")
    if accelerator.num_processes > 1:
        backend += f"; collectives: {torch.distributed.get_backend()}"
    return f"{report(device_kind(accelerator.device).lower())}; layers in {dtype}{engine.description()}{backend}"


def merged_adapter_line(rollout: RolloutConfig) -> str:
    """Return what the log says of an engine that gets 16-bit weights with the adapter merged in."""
    correction = correction_of(rollout)
    corrected = f"rollout.correction {correction} weights tokens by the difference of the two policies"
    if correction == "none":
        corrected = "rollout.correction none leaves the difference of the two policies as it is: truncate corrects it"
    return (
        f"rollout.engine {rollout.engine} samples from 16-bit weights with the adapter merged in, which rounds small "
        f"changes of the adapter away; {corrected}"
    )


def build_sampler(
    config: Config, accelerator: Accelerator, engine: RolloutEngine, rewards: RewardSum, point: ResumePoint
) -> AsyncSampler:
    """Return the sampler, with the completions that the checkpoint held. Each group is scored when it is complete."""
    sampling = config.sampling
    sampler = AsyncSampler(
        engine,
        SamplingPlan(sampling.num_generations, sampling.max_completion_length, sampling.temperature, config.seed),
        accelerator,
        staleness=config.rollout.max_staleness,
        steps_left=config.steps - point.start,
        on_group=rewards.offer,
    )
    sampler.load_state_dict(point.sampled_ahead)
    return sampler


def start_records(
    config: Config, run_dir: Path, data: TrainingData, rewards: RewardSum, start: int, contents: dict[str, str]
) -> RunLogger:
    """Write the data card, reward sources, checksums and rejected rows; start the trackers."""
    record_card(run_dir, config.data)
    for name, source in rewards.sources.items():
        log.info("%s is %s (sha256 %s)", source_label(name, source), source["file"], source["sha256"][:12])
    derived = derived_values(config, data.size, run_dir.name)
    derived |= {"base_model": str(data.model_path), "reward_sources": rewards.sources, "contents": contents}
    tracker = RunLogger(run_dir, config, derived, start + 1 if start else 0)
    if data.rejected:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in data.rejected]
        (run_dir / "rejected.jsonl").write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    return tracker


def derived_values(config: Config, prompts: int | None, run_name: str) -> dict[str, object]:
    """Return effective values under the names that W&B users look for."""
    return {
        "learning_rate": config.optimizer.learning_rate,
        "adam_beta1": config.optimizer.adam_beta1,
        "adam_beta2": config.optimizer.adam_beta2,
        "weight_decay": config.optimizer.weight_decay,
        "warmup_ratio": config.optimizer.warmup_ratio,
        "batch_size": config.prompts_per_step * config.sampling.num_generations,
        "num_train_epochs": config.steps * config.prompts_per_step / prompts if prompts else None,
        "run_name": config.tracking.run_name or run_name,
    }


def summary_line(config: Config, accelerator: Accelerator, data: TrainingData, held_out: list[Prompt]) -> str:
    """Return one line about the run that is about to start."""
    completions = config.prompts_per_step * config.sampling.num_generations
    count, precision = accelerator.num_processes, {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
    processes = f"{count} process{'es' if count > 1 else ''} on {device_kind(accelerator.device)}"
    spread = accelerator.distributed_type.value.removeprefix("NO")
    return (
        f"{data.size or 'streamed'} training prompts, {len(held_out)} held out; {config.prompts_per_step} prompts x "
        f"{config.sampling.num_generations} completions = {completions} per step, {config.steps} steps; {processes}"
        f"{f' ({spread})' if spread else ''}, {precision.get(accelerator.mixed_precision, accelerator.mixed_precision)}"
    )


def build_recorder(
    config: Config,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: Path,
    tracker: RunLogger | None,
    callbacks: list[Callback],
    point: ResumePoint,
) -> Recorder:
    """Return the recorder: files and trackers, console, callbacks, diagnostics."""
    accelerator = policy.accelerator

    def state(step: int, rows: list[dict[str, Any]]) -> State:
        parts = (run_dir, config, policy.model, policy.optimizer, tokenizer, accelerator, policy.strategy)
        return State(step, config.steps, rows, *parts)

    return Recorder(
        config,
        accelerator,
        run_dir,
        tracker,
        Display(config.steps, point.start, enabled=accelerator.is_main_process),
        Callbacks(config.callbacks, callbacks, accelerator),
        build_diagnostics(config, accelerator, tracker),
        state,
        start=point.start,
        first_eval=point.first_eval,
        last_eval=point.last_eval,
    )


def build_diagnostics(config: Config, accelerator: Accelerator, tracker: RunLogger | None) -> Diagnostics:
    """Return the diagnostics of this run, without the findings that it made before a resume."""
    reads_answers = {"accuracy", "countdown"} & {name for name, weight in config.rewards.items() if weight}
    return Diagnostics(
        patience_for(config.steps),
        config.sampling.max_completion_length,
        config.optimizer.learning_rate,
        tolerance=precision_of(accelerator).logprob,
        has_answer=(lambda text: only_answer(text) is not None) if reads_answers else None,
        weights={label: config.rewards[name] for name, label in reward_labels(config.rewards).items()},
        said=tracker.findings_made() if tracker is not None else set(),
    )
