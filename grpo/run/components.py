"""Components: the registered names in a config, and what each component needs of the rest of it."""

from grpo.advantages import SUBSETS, check_advantage
from grpo.config.schema import Config, ObjectiveConfig
from grpo.data.registry import DATASETS
from grpo.errors import ConfigError
from grpo.experience import estimator_of
from grpo.kernels.registry import check_switch
from grpo.kl import KL_ESTIMATORS
from grpo.losses import check_loss, find_loss, unused_settings
from grpo.models.optimizers import OPTIMIZERS, check_schedule
from grpo.rollout.engine import check_engine


def check_components(config: Config) -> None:
    """Check every component that the config names, before anything is loaded.

    Raises:
        ConfigError: an unknown name, an argument that nothing gives, or a setting that a component refuses.
    """
    objective = config.objective
    check_switch()
    check_loss(config)
    check_advantage(estimator_of(objective), config)
    KL_ESTIMATORS.check(objective.kl_estimator, config)
    if objective.subset is not None:
        SUBSETS.check(objective.subset, config)
    elif objective.subset_size is not None and "subset" not in find_loss(objective.loss_type).implied:
        raise ConfigError(
            "objective.subset_size is set, but objective.subset is not: name one, for example max_variance"
        )
    check_engine(config)
    DATASETS.check(config.data.name, config)
    OPTIMIZERS.check(config.optimizer.optim, config)
    check_schedule(config)


def settings_without_effect(config: Config) -> list[str]:
    """Return a line for each setting that is not at its default, but has no effect with the others."""
    objective, default = config.objective, vars(ObjectiveConfig())
    changed = [name for name, value in vars(objective).items() if value != default[name]]
    unused = unused_settings(objective, changed)
    reasons = {name: f"objective.loss_type '{objective.loss_type}' does not use it" for name in unused}
    if objective.beta == 0:
        reasons |= dict.fromkeys(("kl_estimator", "use_bias_correction_kl"), "objective.beta is 0")
    elif objective.kl_in_reward:
        reasons["use_bias_correction_kl"] = "objective.kl_in_reward takes the KL off the reward"
    if not objective.use_adaptive_entropy:
        adaptive = ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
        reasons |= dict.fromkeys(adaptive, "objective.use_adaptive_entropy is false")
    if objective.kl_target is None:
        reasons["kl_horizon"] = "objective.kl_target is not set"
    lines = [
        f"objective.{name} is {getattr(objective, name)}, but has no effect: {reasons[name]}"
        for name in changed
        if name in reasons
    ]
    if config.optimizer.warmup_ratio > 0 and config.optimizer.lr_scheduler_type == "constant":
        lines.append(
            f"optimizer.warmup_ratio is {config.optimizer.warmup_ratio}, but has no effect: the schedule constant has "
            "no warm-up; constant_with_warmup has one"
        )
    return lines
