"""Losses with the clip of PPO but another ratio, average or choice of completions: GSPO, LUSPO, GFPO."""

from typing import Any

from grpo.errors import ConfigError
from grpo.losses import check_clip, clipped, clipped_by_ppo, register_loss


def check_sequence_level(config: Any) -> None:
    """Raise ConfigError for token ratios with GSPO, which is defined by the ratio of whole completions."""
    check_clip(config)
    if config.objective.importance_sampling_level == "token":
        raise ConfigError(
            "objective.loss_type gspo is the ratio of whole completions, but objective.importance_sampling_level is "
            "token: leave it out, or use loss_type grpo"
        )


# GSPO (arXiv 2507.18071): the ratio of the whole completion.
register_loss(
    "gspo", per="sequence", clips=clipped_by_ppo, check=check_sequence_level, importance_sampling_level="sequence"
)(clipped)
# LUSPO (arXiv 2602.05261): as GSPO, without division by the completion's length.
register_loss(
    "luspo", per="sequence_sum", clips=clipped_by_ppo, check=check_clip, importance_sampling_level="sequence"
)(clipped)
# GFPO (arXiv 2508.09726): learn from the shortest completions of each group.
register_loss("gfpo", per="token", clips=clipped_by_ppo, check=check_clip, subset="shortest")(clipped)
