"""CISPO: the importance weight is capped, and no token loses its gradient (MiniMax-M1, arXiv 2506.13585, eq. 4)."""

from typing import Any

from torch import Tensor

from grpo.errors import ConfigError
from grpo.losses import register_loss

DEFAULT_CAP = 5.0
"""Cap where epsilon_high is null. TRL falls back to epsilon (0.2), which caps every ratio, 1 included."""


def check_cap(config: Any) -> None:
    """Raise ConfigError for a cap that scales down every gradient."""
    cap = config.objective.epsilon_high
    if cap is not None and cap < 1:
        raise ConfigError(
            f"objective.epsilon_high is {cap}: for cispo it is the cap of the ratio itself, and a cap below 1 scales "
            f"every gradient down. Set it to about 5, or leave it out"
        )


def above_cap(ratio: Tensor, advantages: Tensor, *, epsilon_high: float | None) -> Tensor:
    return (ratio > (DEFAULT_CAP if epsilon_high is None else epsilon_high)) & (advantages > 0)


@register_loss("cispo", per="token", clips=above_cap, check=check_cap)
def cispo(ratio: Tensor, advantages: Tensor, logprobs: Tensor, *, epsilon_high: float | None) -> Tensor:
    """-min(ratio, epsilon_high).detach() * A * logp      (ScaleRL, arXiv 2510.13786, uses it as well).

    `epsilon_high` is the cap itself, as in TRL.
    """
    return -ratio.clamp(max=DEFAULT_CAP if epsilon_high is None else epsilon_high).detach() * advantages * logprobs
