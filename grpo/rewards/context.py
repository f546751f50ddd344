"""Arguments of a reward besides completions and columns, as in TRL: state of the run, and functions that record.

def brevity(completions, trainer_state, log_extra, log_metric, **columns):
    log_metric("words", mean)                 a metric of the step: the mean of all values that were given
    log_extra("words", [12, 40, ...])         a column of rollouts.jsonl: one value per completion
    trainer_state.global_step                 steps that are done
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

CONTEXT_ARGUMENTS = ("trainer_state", "log_extra", "log_metric")
"""Passed to every reward that names them, or that takes any argument (`**kwargs`)."""


@dataclass(frozen=True)
class TrainerState:
    """The state of the run, with the names of transformers' TrainerState."""

    global_step: int = 0
    """Steps that are done."""
    max_steps: int = 0
    epoch: float | None = None
    num_train_epochs: float | None = None


@dataclass
class Notes:
    """Records of rewards: metrics, and columns with one value per completion."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, dict[int, Any]] = field(default_factory=dict)
    """Column -> index among the completions -> value."""

    def log_metric(self, name: str, value: float) -> None:
        """Record one value of a metric of this step."""
        if not isinstance(value, Real):
            value = float(value)
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: list[Any]) -> None:
        """Record one value per completion. A call after another one adds the completions behind."""
        held = self.extra.setdefault(str(column), {})
        start = len(held)
        for offset, value in enumerate(values.tolist() if hasattr(values, "tolist") else values):
            held[start + offset] = value

    def add(self, other: "Notes", indices: list[int] | None = None, start: int = 0) -> None:
        """Add what another call has recorded.

        Args:
            other: Its columns count the completions of that call.
            indices: The places of these completions here; default: as they are.
            start: Added to each place.
        """
        for name, values in other.metrics.items():
            self.metrics.setdefault(name, []).extend(values)
        for column, found in other.extra.items():
            for place, value in found.items():
                if indices is None or place < len(indices):
                    at = start + (place if indices is None else indices[place])
                    self.extra.setdefault(column, {})[at] = value


def context_arguments(function: Callable[..., Any], state: TrainerState, notes: Notes) -> Mapping[str, Any]:
    """Return those of CONTEXT_ARGUMENTS that the function takes."""
    offered = {"trainer_state": state, "log_extra": notes.log_extra, "log_metric": notes.log_metric}
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in offered.items() if takes_all or name in parameters}
