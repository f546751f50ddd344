"""Entropy bonus: objective.entropy_coef, constant or adapted to a target (Skywork-OR1, arXiv 2505.22312)."""

import math
from dataclasses import dataclass
from typing import Any


def has_entropy_bonus(objective: Any) -> bool:
    """Return whether the entropies have a gradient, in some step at least."""
    return bool(objective.entropy_coef != 0 or objective.use_adaptive_entropy)


@dataclass
class EntropyBonus:
    """The coefficient of the entropy bonus, as TRL adapts it.

    After each optimizer step, the coefficient rises by entropy_coef_delta if the mean entropy of its tokens was at most
    entropy_target, and falls by as much otherwise, within [entropy_coef_min, entropy_coef_max]. It is applied in the
    next step only if that entropy was at most the target.
    """

    objective: Any
    coefficient: float = 0.0
    entropy: float = math.inf
    """Mean entropy per token of the last optimizer step, in nats; infinity: not measured yet."""

    def __post_init__(self) -> None:
        self.coefficient = self.objective.entropy_coef

    @property
    def applied(self) -> float:
        """The coefficient of this optimizer step."""
        is_off = self.objective.use_adaptive_entropy and self.entropy > self.objective.entropy_target
        return 0.0 if is_off else self.coefficient

    def update(self, total: float, count: float) -> None:
        """Take over the entropies of an optimizer step: their sum and number over all ranks."""
        objective = self.objective
        if not objective.use_adaptive_entropy or not count:
            return
        self.entropy = total / count
        step = (
            objective.entropy_coef_delta if self.entropy <= objective.entropy_target else -objective.entropy_coef_delta
        )
        self.coefficient = min(max(self.coefficient + step, objective.entropy_coef_min), objective.entropy_coef_max)

    def state_dict(self) -> dict[str, float]:
        """Return the state for the checkpoint; {} for a constant coefficient."""
        if not self.objective.use_adaptive_entropy or math.isinf(self.entropy):
            return {}
        return {"coefficient": self.coefficient, "entropy": self.entropy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore `state_dict`."""
        if self.objective.use_adaptive_entropy and state:
            self.coefficient, self.entropy = state["coefficient"], state["entropy"]
