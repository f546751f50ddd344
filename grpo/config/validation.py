"""Config checks: values out of range or values that contradict each other -> ConfigError, before anything is loaded.

Ranges are declared in the schema. What a loss, estimator, engine or tracker needs is checked by the component itself
(grpo/run/components.py).
"""

import functools
import math
import os

from grpo.config.schema import Config, LoraConfig, ModelConfig, ObjectiveConfig, flatten, to_dict
from grpo.config.setting import keys_of
from grpo.errors import ConfigError


def check_config(config: Config) -> None:
    """Raise ConfigError, with what came, what is needed and what to change. Replaces ~ in paths by the home folder."""
    expand_home(config)
    values = flatten(to_dict(config))
    for name, key in keys_of(Config).items():
        key.check(values[name])
    check_sampling(config)
    check_model(config.model, config.lora, config.objective)
    check_objective(config)
    check_data(config)
    check_run(config)


def expand_home(config: Config) -> None:
    """Replace ~ and ~user at the start of every path by the home folder: YAML, quotes and `--key=~/x` keep it."""
    for name, key in keys_of(Config).items():
        *sections, leaf = name.split(".")
        holder = functools.reduce(getattr, sections, config)
        value = getattr(holder, leaf)
        if key.setting.path and isinstance(value, str) and value.startswith("~"):
            setattr(holder, leaf, os.path.expanduser(value))


def check_sampling(config: Config) -> None:
    """Refuse a truncated sampling distribution, a token budget that holds no completion, and stale groups for DAPO."""
    sampling = config.sampling
    if sampling.top_p != 1.0 or sampling.top_k != 0:
        key, value = ("top_p", sampling.top_p) if sampling.top_p != 1.0 else ("top_k", sampling.top_k)
        raise ConfigError(
            f"sampling.{key} is {value}: a truncated sampling distribution is not the one that the policy is trained "
            f"as, so the importance ratios would be biased. Leave top_p at 1.0 and top_k at 0 for training"
        )
    evaluation = config.evaluation
    if evaluation.temperature == 0:
        off = {"num_generations": 1, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        for key, value in off.items():
            if getattr(evaluation, key) != value:
                raise ConfigError(
                    f"evaluation.{key} is {getattr(evaluation, key)}, but evaluation.temperature is 0: a greedy "
                    f"completion is the most likely one. Set evaluation.temperature (training: {sampling.temperature})"
                )
    longest = (config.data.max_prompt_length or 0) + sampling.max_completion_length
    if config.tokens_per_batch < longest:
        raise ConfigError(
            f"tokens_per_batch is {config.tokens_per_batch}, too small for one prompt and one completion: "
            f"data.max_prompt_length {config.data.max_prompt_length} + sampling.max_completion_length "
            f"{sampling.max_completion_length} = {longest}. Set tokens_per_batch to at least {longest}"
        )
    if config.rollout.max_staleness and sampling.dynamic_sampling:
        raise ConfigError(
            f"rollout.max_staleness is {config.rollout.max_staleness}, but with sampling.dynamic_sampling the "
            f"rewards of a step decide how many prompts it samples: set one of them back (max_staleness 0, or "
            "dynamic_sampling false)"
        )


def check_data(config: Config) -> None:
    """Refuse a curriculum without its reward, and settings that need all prompts where they are streamed."""
    if config.curriculum.reward is not None and config.curriculum.reward not in config.rewards:
        known = ", ".join(config.rewards)
        raise ConfigError(f"curriculum.reward is '{config.curriculum.reward}', it must be one of the rewards: {known}")
    if config.curriculum.reward is not None and not config.data.shuffle_dataset:
        raise ConfigError(
            "data.shuffle_dataset is false, but a curriculum draws the prompts in an order of its own: set "
            "curriculum.reward to null, or shuffle_dataset to true"
        )
    if not config.data.streaming:
        return
    for key, unknown in [
        ("curriculum.reward", config.curriculum.reward),
        ("num_train_epochs", config.num_train_epochs),
    ]:
        if unknown is not None:
            raise ConfigError(f"{key} is {unknown}, but data.streaming does not know all prompts: set one of them back")


def check_run(config: Config) -> None:
    """Refuse a resume without a run, and a run without rewards."""
    if config.resume == "auto" and config.run_dir is None and config.tracking.run_name is None:
        raise ConfigError(
            "resume is auto, but neither run_dir nor tracking.run_name says which run: add --run_dir outputs/YOUR_RUN"
        )
    if config.load_best_model_at_end and not config.eval_every:
        raise ConfigError(
            "load_best_model_at_end is true, but eval_every is 0: there is no evaluation to choose by. Set eval_every"
        )
    for name, weight in config.rewards.items():
        if not math.isfinite(weight):
            raise ConfigError(f"rewards.{name} is {weight}, needs to be a finite number: the weight of the reward")
    distills = config.objective.beta > 0 and config.model.reference is not None  # docs/theory.md
    if not config.rewards or (not distills and all(weight == 0 for weight in config.rewards.values())):
        raise ConfigError(
            "rewards is empty (or every weight is 0): name at least one, for example --rewards.accuracy 1.0"
        )


def check_objective(config: Config) -> None:
    """Refuse settings that would do nothing, or contradict each other."""
    objective, sampling = config.objective, config.sampling
    if objective.beta == 0 and (objective.kl_in_reward or objective.kl_target is not None):
        key = "kl_in_reward" if objective.kl_in_reward else "kl_target"
        raise ConfigError(
            f"objective.{key} is set, but objective.beta is 0, so there is no reference: set beta above 0"
        )
    if objective.subset_size is not None and objective.subset_size > sampling.num_generations:
        raise ConfigError(
            f"objective.subset_size is {objective.subset_size}, needs to be between 2 and sampling.num_generations "
            f"{sampling.num_generations}"
        )
    completions = config.prompts_per_step * sampling.num_generations
    if objective.mini_batches > completions:
        raise ConfigError(
            f"objective.mini_batches is {objective.mini_batches}, but a step has only {completions} completions "
            f"(prompts_per_step {config.prompts_per_step} x sampling.num_generations {sampling.num_generations}): "
            f"lower it to at most {completions}"
        )
    if objective.top_entropy_quantile < 1 and (objective.entropy_coef != 0 or objective.use_adaptive_entropy):
        raise ConfigError(
            f"objective.top_entropy_quantile is {objective.top_entropy_quantile} and objective.entropy_coef is "
            f"{objective.entropy_coef}: the bonus would raise the entropy of tokens that have no policy gradient. Set "
            "one of them back (top_entropy_quantile 1, or entropy_coef 0 and use_adaptive_entropy false)"
        )
    if objective.entropy_coef_min > objective.entropy_coef_max:
        raise ConfigError(
            f"objective.entropy_coef_min is {objective.entropy_coef_min}, needs to be at most "
            f"objective.entropy_coef_max {objective.entropy_coef_max}"
        )
    if objective.soft_overlong_cache >= sampling.max_completion_length:
        raise ConfigError(
            f"objective.soft_overlong_cache is {objective.soft_overlong_cache}, needs to be below "
            f"sampling.max_completion_length {sampling.max_completion_length}"
        )


def check_model(model: ModelConfig, lora: LoraConfig, objective: ObjectiveConfig) -> None:
    """Refuse a model, adapter and reference that cannot work together."""
    if lora.r is None and (model.load_in_4bit or model.torch_dtype != "float32"):
        key = "load_in_4bit is true" if model.load_in_4bit else f"torch_dtype is {model.torch_dtype}"
        raise ConfigError(
            f"model.{key}, but lora.r is not set: weights that are trained need float32, since a step of 1e-6 is "
            f"lost in the rounding of anything less. Set lora.r (16 is usual), or leave torch_dtype float32 and "
            "load_in_4bit false"
        )
    if lora.r is not None and not lora.target_modules:
        raise ConfigError("lora.target_modules is empty: name layers, for example [q_proj, v_proj], or [all-linear]")
    if objective.beta == 0:
        for key, value in [
            ("reference", model.reference),
            ("sync_ref_model", model.sync_ref_model),
            ("reference_offload", model.reference_offload),
        ]:
            if value:
                raise ConfigError(
                    f"model.{key} is {value}, but objective.beta is 0, so no reference is ever used: set a beta or "
                    "drop it"
                )
    if lora.r is not None and model.sync_ref_model:
        raise ConfigError(
            "model.sync_ref_model is true with lora.r: the reference is the adapter switched off, and cannot move. "
            "Set sync_ref_model to false"
        )
    if lora.r is not None and model.reference_offload and model.reference is None:
        raise ConfigError(
            "model.reference_offload is true with lora.r: the reference is the adapter switched off, and takes no "
            "memory. Set reference_offload to false"
        )
