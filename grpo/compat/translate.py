"""Translation: GRPOConfig -> the config of this trainer.

A field that is declared as `copied` is one key. The functions below translate the others.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

from grpo.compat.arguments import GRPOConfig
from grpo.compat.batch import Schedule, schedule
from grpo.compat.fields import changed, outcomes
from grpo.config.parser import build_config
from grpo.config.schema import Config
from grpo.errors import ConfigError
from grpo.rewards.registry import reward_labels

log = logging.getLogger(__name__)

Values = dict[str, Any]
"""Flat config key -> value."""

TRACKERS = ("tensorboard", "trackio", "wandb")
CORRECTIONS = {"token_truncate": "truncate", "token_mask": "mask"}
"""TRL's name of a correction -> rollout.correction. Others have the same name."""
LOADED = ("device_map", "low_cpu_mem_usage", "use_cache", "use_safetensors", "cache_dir", "trust_remote_code")
"""Keys of model_init_kwargs that change nothing here."""


@dataclass(frozen=True)
class Translation:
    """The config of this trainer that GRPOConfig stands for."""

    config: Config
    schedule: Schedule
    precision: str
    """accelerate's mixed_precision: no, bf16 or fp16."""
    remarks: list[str]
    """What the user should know, one line each."""


def translate(arguments: GRPOConfig, rows: int | None, given: Values) -> Translation:
    """Return the config that `arguments` stand for.

    Args:
        rows: Rows of the training data; None for a stream.
        given: Values of further keys.

    Raises:
        ConfigError: A field has a value that is not supported, with what to use instead.
    """
    remarks: list[str] = []
    check_refused(arguments)
    if line := without_effect(arguments):
        remarks.append(line)
    batch = schedule_of(arguments, rows)
    values = verbatim(arguments)
    values |= lengths(arguments, batch, remarks) | optimizer_values(arguments, batch) | tracking_values(arguments)
    values |= model_values(arguments.model_init_kwargs, remarks) | vllm_values(arguments)
    values |= evaluation_values(arguments, given)
    if arguments.loss_type == "cispo" and arguments.epsilon_high is None:
        remarks.append("loss_type cispo without epsilon_high caps ratios at 5.0; TRL would cap all of them at epsilon")
    return Translation(build_config(values | given), batch, precision_of(arguments), remarks)


def check_refused(arguments: GRPOConfig) -> None:
    """Raise ConfigError for a field that is not supported, with what to use instead."""
    table = outcomes(type(arguments))
    for name, value in changed(arguments).items():
        outcome = table[name]
        if outcome.kind != "refused" or any(value == accepted for accepted in outcome.accepts):
            continue
        if name == "data_seed" and value == arguments.seed:
            continue
        raise ConfigError(f"GRPOConfig: {name} is {value!r}, which is not supported: {outcome.text} (docs/trl.md)")


def without_effect(arguments: GRPOConfig) -> str | None:
    """Return one line about the changed fields that have no effect; None without one."""
    table = outcomes(type(arguments))
    given = {name: value for name, value in changed(arguments).items() if table[name].kind == "no effect"}
    names = [name for name, value in given.items() if value not in table[name].accepts]
    return f"GRPOConfig: without effect here: {', '.join(names)} (docs/trl.md has the reasons)" if names else None


def verbatim(arguments: GRPOConfig) -> Values:
    """Return the fields that are a key under another name."""
    named = {name: outcome.text for name, outcome in outcomes(type(arguments)).items() if outcome.verbatim}
    values = {key: getattr(arguments, name) for name, key in named.items()}
    skipped = "rollout.vllm_" if not arguments.use_vllm else "-"
    return {key: value for key, value in values.items() if value is not None and not key.startswith(skipped)}


def schedule_of(arguments: GRPOConfig, rows: int | None) -> Schedule:
    """Return the batch sizes and the length of the run."""
    assert arguments.generation_batch_size is not None and arguments.steps_per_generation is not None
    return schedule(
        generation_batch_size=arguments.generation_batch_size,
        steps_per_generation=arguments.steps_per_generation,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        num_generations=arguments.num_generations or 0,
        num_iterations=arguments.num_iterations,
        max_steps=arguments.max_steps,
        num_train_epochs=arguments.num_train_epochs,
        rows=rows,
    )


def lengths(arguments: GRPOConfig, batch: Schedule, remarks: list[str]) -> Values:
    """Return sizes of a step, length of the run, and how often it is evaluated and saved."""
    if batch.steps * batch.updates != batch.max_steps:
        remarks.append(
            f"a step here takes {batch.updates} optimizer steps on its completions: {batch.steps} steps take "
            f"{batch.steps * batch.updates} optimizer steps, not {batch.max_steps}"
        )
    save_every = interval("save", arguments.save_strategy, arguments.save_steps, batch, remarks)
    all_checkpoints = batch.steps // save_every + 1 if save_every else 1
    values: Values = {
        "prompts_per_step": batch.prompts_per_step,
        "steps": batch.steps,
        "eval_every": interval("eval", arguments.eval_strategy, evaluation_interval(arguments), batch, remarks),
        "save_every": save_every,
        "save_total_limit": arguments.save_total_limit or all_checkpoints,
        "data.max_prompt_length": None,
        "model.ref_model_sync_steps": batch.steps_of(arguments.ref_model_sync_steps),
    }
    if batch.mini_batches > 1:
        values["objective.mini_batches"] = batch.mini_batches
    return values


def evaluation_interval(arguments: GRPOConfig) -> float:
    """Return eval_steps, which is logging_steps where it is not set."""
    return arguments.eval_steps or arguments.logging_steps


def interval(what: str, strategy: str, every: float, batch: Schedule, remarks: list[str]) -> int:
    """Return the steps between two evaluations, or two checkpoints; 0: none before the end.

    Args:
        what: eval or save, for messages.
        strategy: no, steps or epoch.
        every: Optimizer steps with the strategy steps; below 1: a share of all of them.
    """
    if strategy == "no":
        return 0
    if strategy == "epoch":
        if batch.updates_per_epoch is None:
            raise ConfigError(f"{what}_strategy is epoch, but the data is a stream: set {what}_strategy to steps")
        return batch.steps_of(batch.updates_per_epoch)
    if strategy != "steps":
        raise ConfigError(f"{what}_strategy is {strategy!r}, needs to be one of no, steps, epoch")
    updates = math.ceil(every * batch.max_steps) if 0 < every < 1 else int(every)
    steps = batch.steps_of(updates)
    if steps * batch.updates != updates:
        remarks.append(
            f"{what}_steps is {updates}, but a step here takes {batch.updates} optimizer steps: every "
            f"{steps * batch.updates} instead"
        )
    return steps


def optimizer_values(arguments: GRPOConfig, batch: Schedule) -> Values:
    """Return the warm-up."""
    total, warmup = batch.steps * batch.updates, arguments.warmup_steps
    if warmup > total:
        raise ConfigError(f"warmup_steps is {warmup}, but there are {total} optimizer steps: lower it")
    # The trainer rounds ratio * total up: half a step less gives exactly `warmup` steps.
    ratio = warmup if warmup < 1 else (warmup - 0.5) / total
    return {"optimizer.warmup_ratio": ratio}


def tracking_values(arguments: GRPOConfig) -> Values:
    """Return the trackers, and whether layers are recomputed in the backward pass."""
    asked = arguments.report_to or []
    asked = [asked] if isinstance(asked, str) else list(asked)
    asked = list(TRACKERS[:1]) if asked == ["all"] else [name for name in asked if name != "none"]
    for name in asked:
        if name not in TRACKERS:
            raise ConfigError(
                f"report_to has {name!r}, needs to be of {', '.join(TRACKERS)}, all or none: pass the callback of "
                f"another tracker in callbacks="
            )
    recompute = arguments.activation_checkpointing
    recompute = arguments.gradient_checkpointing if recompute is None else recompute
    return {"tracking.report_to": asked, "model.gradient_checkpointing": bool(recompute)}


def evaluation_values(arguments: GRPOConfig, given: Values) -> Values:
    """Return the sampling of evaluations, which is that of training in TRL, and the metric of the best model.

    Raises:
        ConfigError: The best model is to be chosen by a metric that no evaluation has.
    """
    values = {
        "evaluation.num_generations": arguments.num_generations_eval or arguments.num_generations,
        "evaluation.temperature": arguments.temperature,
    }
    if not arguments.load_best_model_at_end:
        return values
    names = list(reward_labels(given.get("rewards", {})).values())
    asked = (arguments.metric_for_best_model or "").removeprefix("eval_")
    if asked == "reward" and len(names) == 1:
        asked = f"rewards/{names[0]}/mean"
    if asked not in [f"rewards/{name}/mean" for name in names]:
        raise ConfigError(
            f"metric_for_best_model is {arguments.metric_for_best_model!r}, needs to be one of "
            f"{', '.join(f'eval_rewards/{name}/mean' for name in names)}: an evaluation computes no loss"
        )
    return values | {"metric_for_best_model": "eval/" + asked.replace("rewards/", "reward/", 1)}


def model_values(options: Any, remarks: list[str]) -> Values:
    """Return `model.*` of model_init_kwargs.

    Raises:
        ConfigError: An option that is not supported.
    """
    values: Values = {}
    for name, value in (options or {}).items():
        if name in ("dtype", "torch_dtype"):
            if value is not None and str(value).removeprefix("torch.") != "float32":
                remarks.append(
                    f"model_init_kwargs {name} is {value}: weights are trained in float32, since an update of 1e-6 is "
                    f"lost in the rounding of 16 bits; bf16=True computes in bfloat16"
                )
        elif name == "attn_implementation":
            values |= {} if value is None else {"model.attn_implementation": value}
        elif name == "quantization_config" and value is not None:
            values |= quantization_values(value)
        elif name == "revision" and value == "main":  # the default of TRL's ModelConfig
            continue
        elif name == "load_in_4bit":
            values["model.load_in_4bit"] = bool(value)
        elif value is not None and (name not in LOADED or (name == "trust_remote_code" and value)):
            raise ConfigError(
                f"model_init_kwargs has {name} {value!r}, which is not supported: load the model yourself and pass it"
            )
    return values


def quantization_values(quantization: Any) -> Values:
    """Return `model.load_in_4bit` of a BitsAndBytesConfig. Raises ConfigError for another quantization."""
    if not getattr(quantization, "load_in_4bit", False):
        raise ConfigError(
            "quantization_config is not supported: the base of an adapter may be in 4 bits, "
            "BitsAndBytesConfig(load_in_4bit=True), or not quantized"
        )
    return {"model.load_in_4bit": True}


def vllm_values(arguments: GRPOConfig) -> Values:
    """Return the engine, and the correction of its logprobs."""
    if not arguments.use_vllm:
        return {}
    values: Values = {"rollout.engine": "vllm"}
    if not arguments.vllm_importance_sampling_correction:
        return values | {"rollout.correction": "none"}
    mode = arguments.vllm_importance_sampling_mode
    values["rollout.correction"] = CORRECTIONS.get(mode, mode)
    cap = arguments.vllm_importance_sampling_cap
    cap = arguments.vllm_importance_sampling_clip_max if cap is None else cap
    values["rollout.correction_cap"] = math.inf if cap is None else cap
    values["rollout.correction_floor"] = arguments.vllm_importance_sampling_clip_min or 0.0
    return values


def precision_of(arguments: GRPOConfig) -> str:
    """Return accelerate's mixed_precision."""
    if arguments.fp16 and arguments.bf16:
        raise ConfigError("fp16 and bf16 are both true: set one of them")
    return "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "no"


def lora_values(peft_config: Any, model_type: str, remarks: list[str]) -> Values:
    """Return `lora.*` of a peft.LoraConfig.

    Raises:
        ConfigError: A setting that is not supported.
    """
    from peft import LoraConfig

    if type(peft_config) is not LoraConfig:
        raise ConfigError(f"peft_config is a {type(peft_config).__name__}, needs to be a peft.LoraConfig")
    plain = LoraConfig()
    mapped = ("r", "lora_alpha", "target_modules", "use_rslora", "lora_dropout", "task_type", "inference_mode")
    described = ("base_model_name_or_path", "revision", "peft_type", "auto_mapping", "peft_version", "runtime_config")
    for name, value in vars(peft_config).items():
        if name not in (*mapped, *described) and value != getattr(plain, name, None):
            raise ConfigError(
                f"peft_config has {name} {value!r}, which is not supported: adapters have r, lora_alpha, "
                f"target_modules and use_rslora"
            )
    if peft_config.lora_dropout:
        remarks.append(
            f"lora_dropout {peft_config.lora_dropout} has no effect: every dropout is 0, so that sampling and training "
            f"see one policy"
        )
    return {
        "lora.r": peft_config.r,
        "lora.lora_alpha": peft_config.lora_alpha,
        "lora.use_rslora": peft_config.use_rslora,
        "lora.target_modules": target_modules(peft_config.target_modules, model_type),
    }


def target_modules(given: Any, model_type: str) -> list[str]:
    """Return the names of the layers that get an adapter; peft's default of the model's family for None."""
    if given is None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

        given = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, "all-linear")
    if isinstance(given, str) and given != "all-linear":
        raise ConfigError(
            f"peft_config has target_modules {given!r}, a pattern: name the layers in a list, or use 'all-linear'"
        )
    return [given] if isinstance(given, str) else sorted(given)
