"""Components: the registered names in a config, and what each component needs of the rest of it."""

from grpo.advantages import SUBSETS, check_advantage
from grpo.config.schema import Config
from grpo.data.registry import DATASETS
from grpo.errors import ConfigError
from grpo.experience import estimator_of
from grpo.kernels.registry import check_switch
from grpo.kl import KL_ESTIMATORS
from grpo.losses import check_loss, find_loss
from grpo.models.optimizers import OPTIMIZERS
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
