"""Setup: a config -> everything a run needs, checked in the order of cost: config, data, rewards, then weights."""

import json
import logging
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from grpo.advantages import ADVANTAGES, SUBSETS
from grpo.config.schema import Config, DataConfig, ObjectiveConfig, flatten, to_dict
from grpo.data.card import record_card
from grpo.data.rows import Example, load_examples
from grpo.data.stream import PromptStream, render_prompts
from grpo.data.training_data import TrainingData, repeated_prompts, training_data
from grpo.errors import ConfigError, StorageError
from grpo.experience import estimator_of
from grpo.kernels.cpu.compiler import kernels
from grpo.losses import check_parameters, find_objective
from grpo.models.optimizer_state import Tensors
from grpo.models.strategies.registry import start_accelerator
from grpo.policy import Policy
from grpo.rewards.scoring import RewardSum
from grpo.rewards.sources import changed_sources, reward_sources
from grpo.rewards.workers import RewardWorkerPool
from grpo.rewards.xml_format import only_answer
from grpo.rollout.async_sampler import AsyncSampler
from grpo.rollout.engine import RolloutEngine, build_engine, find_engine, is_separate
from grpo.rollout.logprob_mismatch import check_agreement, verify_weight_sync
from grpo.rollout.vllm_engine import check_vllm, longest_of
from grpo.run.callbacks import Callbacks, build_callbacks
from grpo.run.checkpoint import check_room, load_checkpoint, newest_valid, read_state
from grpo.run.resume import check_changes
from grpo.run.state import Progress, Run
from grpo.runtime.distributed import run_on_main
from grpo.runtime.precision import precision_of
from grpo.runtime.run_lock import RunLock, check_free
from grpo.tracking.console import Display, show_messages
from grpo.tracking.diagnostics import Diagnostics, patience_for
from grpo.tracking.run_logger import Tracker, check_trackers, choose_run_dir
from grpo.types import Group, Prompt, SamplingPlan

log = logging.getLogger(__name__)


@dataclass
class Before:
    """What a run had come to when it was interrupted; as it stands, that of a run that starts."""

    start: int = 0
    """Steps that are done."""
    progress: Progress = field(default_factory=Progress)
    sampled_ahead: list[dict] = field(default_factory=list)
    first_eval: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)


def prepare(config: Config) -> Run:
    """Everything that `train` needs. Raises ConfigError before any weight loads for whatever can be known by then."""
    check_names(config.objective)
    find_engine(config.rollout.engine)
    score = build_score(config)
    check_trackers(config.tracking.report_to)
    callbacks = build_callbacks(config.callbacks)

    accelerator, run_dir = start_processes(config)
    show_messages()
    held_out_rows = load_examples(config.data, "held_out", config.seed) if config.eval_every else []
    checkpoint = _checkpoint(config, run_dir)
    data = training_data(config, accelerator, score, model_path)
    if checkpoint is not None:
        for line in check_resumption(config, read_state(checkpoint), score, accelerator.num_processes):
            log.info(line)
    score.start()
    held_out = held_out_prompts(config, held_out_rows, data)

    policy = build_policy(config, accelerator, data.model_path)
    before = Before(progress=Progress(beta=config.objective.beta))
    if checkpoint is not None:
        before = continue_from(checkpoint, config, policy, data)
    policy.check()
    policy.refresh_sampler()
    engine = checked_engine(config, accelerator, policy, data.tokenizer)
    ahead = sampling_ahead(config, accelerator, engine, score, before.start)
    ahead.load(before.sampled_ahead, accelerator.process_index, accelerator.num_processes)

    lock, tracker = None, None
    if accelerator.is_main_process:
        for line in check_room(run_dir, *policy.bytes_on_disk(), config.save_total_limit):
            log.info(line)
        lock = lock_run(run_dir)
        tracker = first_records(config, run_dir, data, score, before.start)
    log.info(in_one_line(config, accelerator, data, held_out))
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "no" and kernels() is None:
        log.info("what is C here could not be compiled (with cc, or what CC names): it runs in torch, and takes longer")
    run = Run(
        config,
        accelerator,
        run_dir,
        before.start,
        policy,
        data.tokenizer,
        engine,
        ahead,
        data.stream,
        held_out,
        score,
        tracker,
        display=Display(config.steps, before.start, enabled=accelerator.is_main_process),
        progress=before.progress,
        lock=lock,
        callbacks=Callbacks(config.callbacks, callbacks, accelerator),
        steps_done=before.start,
        watch=watch_for(config, accelerator, tracker),
        first_eval=before.first_eval,
        last_eval=before.last_eval,
    )
    run.callbacks.begin(run.state(run.start, []))
    return run


def start_processes(config: Config) -> tuple[Accelerator, Path]:
    """The accelerator, and the run directory, which is free: the same on every process."""
    accelerator = start_accelerator(config.rank_timeout)
    run_dir = broadcast_object_list([choose_run_dir(config, datetime.now())])[0]
    if accelerator.is_main_process:
        check_free(run_dir)
    if config.rollout.engine == "vllm":
        check_vllm(config, accelerator.num_processes)
    return accelerator, run_dir


def held_out_prompts(config: Config, rows: list[Example], data: TrainingData) -> list[Prompt]:
    """The prompts that evaluation asks. Says which of them are trained on."""
    held_out = render_prompts(rows, data.tokenizer, config.data.max_prompt_length)[0] if rows else []
    if isinstance(data.stream, PromptStream) and isinstance(data.stream.prompts, list):  # large files: launch/check.py
        for line in repeated_prompts(data.stream.prompts, held_out):
            log.info(line)
    return held_out


def build_policy(config: Config, accelerator: Accelerator, path: str) -> Policy:
    """Return the policy with the weights of `path`, ready to train."""
    torch.manual_seed(config.seed)
    return Policy(
        accelerator,
        path,
        config.model,
        config.objective,
        config.optimizer,
        config.lora,
        temperature=config.sampling.temperature,
        optimizer_steps=config.steps * config.objective.num_iterations,
        separate_sampler=config.rollout.max_staleness > 0,
        sampled_elsewhere=config.rollout.engine == "vllm",
    )


def read_checkpoint(checkpoint: Path, policy: Policy) -> tuple[Tensors, dict]:
    """What a checkpoint holds; its tensors only on the main process, if that hands them out. Collective then."""
    if not policy.broadcasts_checkpoint:
        return load_checkpoint(checkpoint)
    tensors: Tensors = {}

    def read() -> dict:
        nonlocal tensors
        tensors, state = load_checkpoint(checkpoint)
        return state

    state = run_on_main(policy.accelerator, read)
    return tensors, state


def continue_from(checkpoint: Path, config: Config, policy: Policy, data: TrainingData) -> Before:
    """Put the policy and the stream where the checkpoint left them. Raises ConfigError if all steps are done."""
    tensors, state = read_checkpoint(checkpoint, policy)
    policy.load_state_dict(tensors, state)
    del tensors  # whole, on the main process, where the weights are sharded
    data.stream.load_state_dict(state.get("stream", {}))
    start = state["step"]
    log.info(f"resuming from {checkpoint}: {start} of {config.steps} steps are done")
    if start >= config.steps:
        raise ConfigError(f"{checkpoint} has done all {config.steps} steps: raise steps to go on")
    progress = Progress(**(state.get("progress") or progress_of_old(state, config)))
    return Before(start, progress, state.get("sampled_ahead", []), state["first_eval"], state["last_eval"])


def checked_engine(
    config: Config, accelerator: Accelerator, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> RolloutEngine:
    """The engine, proven to sample from the policy: its updates arrive, and its logprobs are the trainer's."""
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
            cache_gib=config.rollout.cache_gib,
        )
    if is_separate(engine):
        verify_weight_sync(engine, policy, config)
    check_agreement(engine, policy, config.sampling.temperature, config.rollout.max_logprob_difference)
    return engine


def first_records(config: Config, run_dir: Path, data: TrainingData, score: RewardSum, start: int) -> Tracker:
    """What is written before the first step: whose the data is, which rewards judge, which rows were rejected."""
    record_card(run_dir, config.data)
    sources = reward_sources(score.functions)
    for name, source in sources.items():
        log.info(f"reward '{name}' is {source['file']} (sha256 {source['sha256'][:12]})")
    derived = derived_values(config, data.size, run_dir.name)
    derived |= {"base_model": str(data.model_path), "reward_sources": sources}
    tracker = Tracker(run_dir, config, derived, start + 1 if start else 0)
    if data.rejected:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in data.rejected]
        (run_dir / "rejected.jsonl").write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    return tracker


def in_one_line(config: Config, accelerator: Accelerator, data: TrainingData, held_out: list[Prompt]) -> str:
    """What is about to run, on what."""
    completions = config.prompts_per_step * config.sampling.num_generations
    return (
        f"{data.size or 'streamed'} training prompts, {len(held_out)} held out; {config.prompts_per_step} prompts x "
        f"{config.sampling.num_generations} completions = {completions} per step, {config.steps} steps, "
        f"{accelerator.num_processes} process(es) on {accelerator.device} ({accelerator.distributed_type.value}), {accelerator.mixed_precision} precision"
    )


def sampling_ahead(
    config: Config, accelerator: Accelerator, engine: RolloutEngine, score: RewardSum, start: int
) -> AsyncSampler:
    """How the completions of a step are made: the engine's, each group scored as soon as it is whole."""
    sampling = config.sampling
    plan = SamplingPlan(sampling.num_generations, sampling.max_completion_length, sampling.temperature, config.seed)

    def generate(prompts: list[Prompt]) -> list[Group]:
        with accelerator.autocast():
            return engine.generate(prompts, plan, finished=score.offer)

    return AsyncSampler(generate, config.rollout.max_staleness, config.steps - start, accelerator.device)


def check_resumption(config: Config, saved: dict, score: RewardSum, processes: int) -> list[str]:
    """What is not as it was when the checkpoint was written. Raises ConfigError for what may not change."""
    lines = check_changes(
        saved["config"], flatten(to_dict(config)), config.allow_changes, (saved["processes"], processes)
    )
    return lines + changed_sources(saved.get("reward_sources", {}), reward_sources(score.functions))


def progress_of_old(state: dict, config: Config) -> dict:
    """A checkpoint of before runs counted their draws: each step drew prompts_per_step, and beta was the config's."""
    return {"draws": state["step"] * state["config"]["prompts_per_step"], "beta": config.objective.beta}


def check_names(objective: ObjectiveConfig) -> None:
    """Raises ConfigError for a registered name that is not there, and for a loss that asks for what nobody offers."""
    check_parameters(find_objective(objective.loss_type), objective.loss_type, vars(objective))
    estimator = estimator_of(objective)
    ADVANTAGES.get(estimator)
    if estimator != "group" and objective.scale_rewards != "group":
        raise ConfigError(
            f"objective.scale_rewards is {objective.scale_rewards}, but the advantage estimator {estimator} has a scale of "
            f"its own: leave scale_rewards out, or set objective.advantage_estimator to group"
        )
    if objective.subset is not None:
        SUBSETS.get(objective.subset)


def lock_run(run_dir: Path) -> RunLock:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return RunLock(run_dir)
    except OSError as error:
        raise StorageError(f"cannot write the run directory {run_dir}: {error}. Set another --run_dir") from error


def watch_for(config: Config, accelerator: Accelerator, tracker: Tracker | None) -> Diagnostics:
    """What looks for the reasons why this run does not learn."""
    reads_answers = {"accuracy", "countdown"} & {name for name, weight in config.rewards.items() if weight}
    return Diagnostics(
        patience_for(config.steps),
        config.sampling.max_completion_length,
        config.optimizer.learning_rate,
        tolerance=precision_of(accelerator).logprob,
        has_answer=(lambda text: only_answer(text) is not None) if reads_answers else None,
        said=tracker.findings_made() if tracker is not None else set(),
    )


def build_score(config: Config) -> RewardSum:
    """The rewards, in worker processes unless scoring.workers is 0. Raises ConfigError for one that is not there."""
    if config.scoring.workers == 0:
        return RewardSum(config.rewards, config.reward_kwargs)
    scoring = config.scoring
    return RewardWorkerPool(
        config.rewards, scoring.deadline, scoring.on_error, scoring.workers, kwargs=config.reward_kwargs
    )


def model_path(config: Config, rows: list[Example], accelerator: Accelerator) -> str:
    """The folder or hub id to load; for "starter", the folder is made first, once, by the main process."""
    if config.model.name != "starter":
        return config.model.name
    from grpo.models.tiny import make_tiny_model

    problems = None
    if config.data.name != "arithmetic":
        problems = [{"question": _question(row, config.data), "answer": _worked_answer(row)} for row in rows]
    path = ""
    if accelerator.is_main_process:
        path = str(make_tiny_model(seed=config.seed, problems=problems))
    return broadcast_object_list([path])[0]


def derived_values(config: Config, prompts: int | None, run_name: str) -> dict[str, object]:
    """What W&B users look for under its usual names, with the effective values."""
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


def _checkpoint(config: Config, run_dir: Path) -> Path | None:
    if config.resume is None:
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        if not path.is_dir():
            raise ConfigError(f"resume: there is no folder {path}. Use --resume auto for the newest in {run_dir}")
        return path
    path_or_none, ignored = newest_valid(run_dir)
    for reason in ignored:
        log.info(reason)
    return path_or_none


def _question(row: Example, data: DataConfig) -> str:
    return str(row.columns.get("question", row.columns.get(data.question, "")))


def _worked_answer(row: Example) -> str:
    return str(row.columns.get("solution") or row.columns["answer"])
