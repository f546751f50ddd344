"""CISPO: the importance weight is capped, but no token loses its gradient (MiniMax-M1, arXiv 2506.13585, eq. 4)."""

from typing import Any

from torch import Tensor

from grpo.errors import ConfigError
from grpo.losses import register_loss

DEFAULT_CAP = 5.0
"""Cap if epsilon_high is null. TRL uses epsilon (0.2) then, which caps every ratio, even 1."""


def check_cap(config: Any) -> None:
    """Raise ConfigError for a cap below 1, which would scale down every gradient."""
    cap = config.objective.epsilon_high
    if cap is not None and cap < 1:
        raise ConfigError(
            f"objective.epsilon_high is {cap}: for cispo it is the cap of the ratio itself, and a cap below 1 scales "
            f"every gradient down. Set it to about 5, or leave it out"
        )


def above_cap(ratio: Tensor, advantages: Tensor, *, epsilon_high: float | None) -> Tensor:
    """Return a mask of the tokens at which the ratio is capped and the advantage is positive (for the clip metrics)."""
    return (ratio > (DEFAULT_CAP if epsilon_high is None else epsilon_high)) & (advantages > 0)


@register_loss("cispo", per="token", clips=above_cap, check=check_cap)
def cispo(ratio: Tensor, advantages: Tensor, logprobs: Tensor, *, epsilon_high: float | None) -> Tensor:
    """-min(ratio, epsilon_high).detach() * A * logp      (also used by ScaleRL, arXiv 2510.13786).

    `epsilon_high` is the cap itself, as in TRL. Shapes of losses: see grpo/losses.py.
    """
    return -ratio.clamp(max=DEFAULT_CAP if epsilon_high is None else epsilon_high).detach() * advantages * logprobs
