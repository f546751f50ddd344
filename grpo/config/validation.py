"""Config checks: values that cannot work together -> ConfigError with what came, what is needed and what to change, before
anything is loaded."""

from typing import TYPE_CHECKING

from grpo.errors import ConfigError

if TYPE_CHECKING:
    from grpo.config.schema import Config, LoraConfig, ModelConfig, ObjectiveConfig

TRACKERS = ("tensorboard", "trackio", "wandb")


def check_config(config: "Config") -> None:
    """Raise ConfigError for values that cannot work together."""
    check_ranges(config)
    check_sampling(config)
    check_rollout(config)
    check_model(config.model, config.lora, config.objective)
    check_objective(config)
    check_data(config)
    check_run(config)


def check_ranges(config: "Config") -> None:
    """Numbers below the least that makes sense."""
    sampling, objective, optimizer = config.sampling, config.objective, config.optimizer
    for key, value, lowest in [
        ("steps", config.steps, 1),
        ("prompts_per_step", config.prompts_per_step, 1),
        ("tokens_per_batch", config.tokens_per_batch, 1),
        ("eval_every", config.eval_every, 0),
        ("save_every", config.save_every, 0),
        ("save_total_limit", config.save_total_limit, 1),
        ("rank_timeout", config.rank_timeout, 1),
        ("curriculum.patience", config.curriculum.patience, 1),
        ("curriculum.return_after", config.curriculum.return_after, 1),
        ("sampling.max_completion_length", sampling.max_completion_length, 1),
        ("sampling.top_k", sampling.top_k, 0),
        ("objective.num_iterations", objective.num_iterations, 1),
        ("objective.beta", objective.beta, 0),
        ("objective.epsilon", objective.epsilon, 0),
        ("objective.kl_horizon", objective.kl_horizon, 1),
        ("objective.soft_overlong_cache", objective.soft_overlong_cache, 0),
        ("sampling.max_sampling_rounds", sampling.max_sampling_rounds, 1),
        ("sampling.oversample", sampling.oversample, 1),
        ("optimizer.learning_rate", optimizer.learning_rate, 0),
        ("optimizer.weight_decay", optimizer.weight_decay, 0),
        ("rollout.slots", config.rollout.slots, 1),
        ("rollout.cache_gib", config.rollout.cache_gib or 0, 0),
        ("rollout.correction_cap", config.rollout.correction_cap, 1),
        ("rollout.max_staleness", config.rollout.max_staleness, 0),
        ("rollout.vllm_server_timeout", config.rollout.vllm_server_timeout, 1),
        ("lora.r", 1 if config.lora.r is None else config.lora.r, 1),
        ("lora.lora_alpha", config.lora.lora_alpha, 1),
        ("model.ref_model_sync_steps", config.model.ref_model_sync_steps, 1),
        ("scoring.deadline", config.scoring.deadline, 0.1),
        ("scoring.workers", config.scoring.workers, 0),
        ("tracking.finish_timeout", config.tracking.finish_timeout, 0),
    ]:
        if not value >= lowest:  # written so that NaN is refused
            raise ConfigError(f"{key} is {value}, needs at least {lowest}")
    if not 0 <= optimizer.warmup_ratio <= 1:
        raise ConfigError(f"optimizer.warmup_ratio is {optimizer.warmup_ratio}, needs to be between 0 and 1")
    if config.num_train_epochs is not None and not config.num_train_epochs > 0:
        raise ConfigError(f"num_train_epochs is {config.num_train_epochs}, needs to be above 0")


def check_sampling(config: "Config") -> None:
    """Completions that could teach nothing, or something else than what was sampled."""
    sampling = config.sampling
    if sampling.num_generations < 2:
        raise ConfigError(
            f"sampling.num_generations is {sampling.num_generations}, needs at least 2: a lone completion has no "
            f"siblings to be compared with, so its advantage is always 0"
        )
    if not sampling.temperature > 0:
        raise ConfigError(
            f"sampling.temperature is {sampling.temperature}, needs to be above 0: greedy completions of one prompt are "
            f"all the same, so nothing could be learned from comparing them"
        )
    if sampling.top_p != 1.0 or sampling.top_k != 0:
        key, value = ("top_p", sampling.top_p) if sampling.top_p != 1.0 else ("top_k", sampling.top_k)
        raise ConfigError(
            f"sampling.{key} is {value}: a truncated sampling distribution is not the one that the policy is trained "
            f"as, so the importance ratios would be biased. Leave top_p at 1.0 and top_k at 0 for training"
        )
    longest = (config.data.max_prompt_length or 0) + sampling.max_completion_length
    if config.tokens_per_batch < longest:
        raise ConfigError(
            f"tokens_per_batch is {config.tokens_per_batch}, too small for one prompt and one completion: "
            f"data.max_prompt_length {config.data.max_prompt_length} + sampling.max_completion_length "
            f"{sampling.max_completion_length} = {longest}. Set tokens_per_batch to at least {longest}"
        )


def check_rollout(config: "Config") -> None:
    """Engines that cannot do what is asked of them."""
    staleness, engine = config.rollout.max_staleness, config.rollout.engine
    if staleness and config.sampling.dynamic_sampling:
        raise ConfigError(
            f"rollout.max_staleness is {staleness}, but with sampling.dynamic_sampling the rewards of a step "
            f"decide how many prompts it samples: set one of them back (max_staleness 0, or dynamic_sampling false)"
        )
    if engine == "vllm" and staleness:
        raise ConfigError(
            f"rollout.max_staleness is {staleness}, which rollout.engine vllm cannot do yet: set it to 0, or "
            f"the engine to native"
        )
    if config.model.attn_implementation != "grpo" and engine == "native":
        raise ConfigError(
            f"model.attn_implementation is {config.model.attn_implementation}, but rollout.engine native decodes with the "
            f"attention called grpo: leave attn_implementation out, or set rollout.engine to transformers"
        )


def check_data(config: "Config") -> None:
    """Streamed data knows no whole; a curriculum needs a reward that exists."""
    if config.curriculum.reward is not None and config.curriculum.reward not in config.rewards:
        known = ", ".join(config.rewards)
        raise ConfigError(f"curriculum.reward is '{config.curriculum.reward}', it must be one of the rewards: {known}")
    if not config.data.streaming:
        return
    if config.data.shuffle_buffer < 1:
        raise ConfigError(f"data.shuffle_buffer is {config.data.shuffle_buffer}, needs at least 1")
    for key, unknown in [
        ("curriculum.reward", config.curriculum.reward),
        ("num_train_epochs", config.num_train_epochs),
    ]:
        if unknown is not None:
            raise ConfigError(f"{key} is {unknown}, but data.streaming does not know all prompts: set one of them back")


def check_run(config: "Config") -> None:
    """What a run is for, where it is, and who is told."""
    if config.resume == "auto" and config.run_dir is None and config.tracking.run_name is None:
        raise ConfigError(
            "resume is auto, but neither run_dir nor tracking.run_name says which run: add --run_dir outputs/YOUR_RUN"
        )
    if not config.rewards or all(weight == 0 for weight in config.rewards.values()):
        raise ConfigError(
            "rewards is empty (or every weight is 0): name at least one, for example --rewards.accuracy 1.0"
        )
    for tracker in config.tracking.report_to:
        if tracker not in TRACKERS:
            raise ConfigError(f"tracking.report_to has '{tracker}', knows {', '.join(TRACKERS)}")


def check_objective(config: "Config") -> None:
    """Settings of the objective that would do nothing, or contradict each other."""
    objective, sampling = config.objective, config.sampling
    high = objective.epsilon if objective.epsilon_high is None else objective.epsilon_high
    if objective.loss_type == "gspo" and objective.importance_sampling_level == "token":
        raise ConfigError(
            "objective.loss_type gspo is the ratio of whole completions, but objective.importance_sampling_level is token: "
            "leave it out, or use loss_type grpo"
        )
    if objective.loss_type == "cispo" and high < 1 and objective.epsilon_high is not None:
        raise ConfigError(
            f"objective.epsilon_high is {high}: for cispo it is the cap of the ratio itself, and a cap below 1 scales every "
            f"gradient down. Set it to about 5, or leave it out"
        )
    if objective.delta is not None and objective.delta <= 1 + high:
        raise ConfigError(
            f"objective.delta is {objective.delta}, needs to be above 1 + epsilon_high = {1 + high}: below, the clip acts first"
        )
    if objective.beta == 0 and (objective.kl_in_reward or objective.kl_target is not None):
        key = "kl_in_reward" if objective.kl_in_reward else "kl_target"
        raise ConfigError(
            f"objective.{key} is set, but objective.beta is 0, so there is no reference: set beta above 0"
        )
    if objective.kl_target is not None and not objective.kl_target > 0:
        raise ConfigError(f"objective.kl_target is {objective.kl_target}, needs to be above 0")
    if objective.subset_size is not None and not 2 <= objective.subset_size <= sampling.num_generations:
        raise ConfigError(
            f"objective.subset_size is {objective.subset_size}, needs to be between 2 and sampling.num_generations "
            f"{sampling.num_generations}"
        )
    if objective.subset_size is not None and objective.subset is None and objective.loss_type != "gfpo":
        raise ConfigError(
            "objective.subset_size is set, but objective.subset is not: name one, for example max_variance"
        )
    if objective.soft_overlong_cache >= sampling.max_completion_length:
        raise ConfigError(
            f"objective.soft_overlong_cache is {objective.soft_overlong_cache}, needs to be below "
            f"sampling.max_completion_length {sampling.max_completion_length}"
        )
    if objective.multi_objective_aggregation == "normalize_then_sum" and objective.advantage_estimator not in (
        None,
        "gdpo",
    ):
        raise ConfigError(
            f"objective.multi_objective_aggregation normalize_then_sum is advantage_estimator gdpo, which is "
            f"{objective.advantage_estimator}: set only one of the two"
        )


def check_model(model: "ModelConfig", lora: "LoraConfig", objective: "ObjectiveConfig") -> None:
    """Raise ConfigError for a model, adapter and reference that cannot work together."""
    if lora.r is None and (model.load_in_4bit or model.torch_dtype != "float32"):
        key = "load_in_4bit is true" if model.load_in_4bit else f"torch_dtype is {model.torch_dtype}"
        raise ConfigError(
            f"model.{key}, but lora.r is not set: weights that are trained need float32, since a step of 1e-6 is lost in "
            f"the rounding of anything less. Set lora.r (16 is usual), or leave torch_dtype float32 and load_in_4bit false"
        )
    if model.load_in_4bit and model.gguf_file:
        raise ConfigError("model.load_in_4bit and model.gguf_file cannot be combined: a GGUF is loaded dequantized")
    if lora.r is not None and not lora.target_modules:
        raise ConfigError("lora.target_modules is empty: name layers, for example [q_proj, v_proj], or [all-linear]")
    if not 0 < model.ref_model_mixup_alpha <= 1:
        raise ConfigError(f"model.ref_model_mixup_alpha is {model.ref_model_mixup_alpha}, needs to be in (0, 1]")
    if objective.beta == 0:
        for key, value in [
            ("reference", model.reference),
            ("sync_ref_model", model.sync_ref_model),
            ("reference_offload", model.reference_offload),
        ]:
            if value:
                raise ConfigError(
                    f"model.{key} is {value}, but objective.beta is 0, so no reference is ever used: set a beta or drop it"
                )
    if lora.r is not None and model.sync_ref_model:
        raise ConfigError(
            "model.sync_ref_model is true with lora.r: the reference is the adapter switched off, and cannot move. "
            "Set sync_ref_model to false"
        )
    if lora.r is not None and model.reference_offload and model.reference is None:
        raise ConfigError(
            "model.reference_offload is true with lora.r: the reference is the adapter switched off, and takes no memory. "
            "Set reference_offload to false"
        )
