"""Callbacks of transformers: this trainer's hooks -> TrainerCallback events, TrainerState and log_history."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from grpo.compat.arguments import GRPOConfig
from grpo.compat.batch import Schedule
from grpo.compat.logs import evaluation_logs, merged, step_logs
from grpo.run.callbacks import Callback, Metrics, State


@dataclass
class Events:
    """The events of one GRPOTrainer, and the state that callbacks see. `state` counts optimizer steps, as in TRL."""

    arguments: GRPOConfig
    schedule: Schedule
    callbacks: list[Any]
    weights: dict[str, float]
    """Weight of each reward, by its short name."""
    sets: dict[str, int]
    """Evaluation set -> its number of prompts, in the order in which they are evaluated."""
    state: TrainerState = field(default_factory=TrainerState)
    control: TrainerControl = field(default_factory=TrainerControl)
    parts: dict[str, Any] = field(default_factory=dict)
    """What callbacks get besides: model, processing_class, optimizer."""
    error: Exception | None = None
    """What a callback has raised. Training ends with it."""
    losses: list[float] = field(default_factory=list)
    """Loss of each step of this call of train."""
    entries: list[dict[str, float]] = field(default_factory=list)
    """Logs of the steps since the last entry of log_history."""

    def __post_init__(self) -> None:
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in self.callbacks]
        self.state.is_world_process_zero = self.state.is_local_process_zero = self.arguments.process_index == 0
        self.state.max_steps = self.schedule.steps * self.schedule.updates
        epoch = self.schedule.updates_per_epoch
        self.state.num_train_epochs = -(-self.state.max_steps // epoch) if epoch else 1
        self.state.logging_steps = int(max(1, self.logging_steps))
        self.state.epoch = 0.0

    @property
    def logging_steps(self) -> float:
        """Optimizer steps between two entries of log_history."""
        every = self.arguments.logging_steps
        return max(1, round(every * self.schedule.max_steps)) if 0 < every < 1 else max(1, every)

    def call(self, event: str, **given: Any) -> None:
        """Call an event of every callback."""
        for callback in list(self.callbacks):
            changed = getattr(callback, event)(self.arguments, self.state, self.control, **self.parts, **given)
            self.control = self.control if changed is None else changed

    def log(self, logs: dict[str, float]) -> None:
        """Add an entry to log_history and call on_log."""
        if self.schedule.updates_per_epoch:
            logs = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control.should_log = False
        self.call("on_log", logs=logs)

    def begin(self, step: int) -> None:
        """Call on_train_begin after `step` steps."""
        self.count(step)
        self.call("on_train_begin")

    def count(self, step: int) -> None:
        """Set the state to that after `step` steps."""
        self.state.global_step = step * self.schedule.updates
        per_epoch = self.schedule.updates_per_epoch
        self.state.epoch = self.state.global_step / per_epoch if per_epoch else 0.0

    def is_due(self, before: int) -> bool:
        """Return whether an entry of log_history is due after the optimizer steps from `before` on."""
        now, strategy = self.state.global_step, self.arguments.logging_strategy
        if strategy == "no":
            return False
        if strategy == "epoch":
            per_epoch = self.schedule.updates_per_epoch
            return per_epoch is not None and now // per_epoch > before // per_epoch
        first = self.arguments.logging_first_step and before == 0
        return first or now // self.logging_steps > before // self.logging_steps

    def evaluated(self, rows: list[dict[str, Any]], prefix: str, sets: dict[str, int]) -> dict[str, float]:
        """Return the logs of an evaluation: of all prompts together, and of each of `sets` where they have names."""
        logs = evaluation_logs(rows, self.weights, prefix)
        first = 0
        for name, count in sets.items():
            own = [row for row in rows if first <= row["draw"] < first + count]
            logs |= evaluation_logs(own, self.weights, f"{prefix}_{name}") if name else {}
            first += count
        return logs


def guarded(hook: Callable[..., None]) -> Callable[..., None]:
    """Decorator for a hook: an error in a user's callback ends the training, and `train` raises it."""

    @functools.wraps(hook)
    def call(self: "Bridge", *arguments: Any) -> None:
        try:
            hook(self, *arguments)
        except Exception as error:
            self.events.error = self.events.error or error
            self.stop = True

    return call


class Bridge(Callback):
    """Calls the events of a GRPOTrainer. `bridge_to` makes the class that the run creates."""

    events: Events

    def on_train_begin(self, state: State) -> None:
        """Give model, tokenizer and optimizer to the callbacks. `GRPOTrainer.train` calls on_train_begin."""
        parts = {"model": state.model, "processing_class": state.tokenizer, "optimizer": state.optimizer}
        self.events.parts = parts | {"lr_scheduler": None, "train_dataloader": None, "eval_dataloader": None}
        self.events.count(state.step)

    @guarded
    def on_step_begin(self, state: State) -> None:
        """on_epoch_begin where one begins, and on_step_begin."""
        events = self.events
        per_epoch = events.schedule.updates_per_epoch
        if per_epoch and events.state.global_step % per_epoch < events.schedule.updates:
            events.call("on_epoch_begin")
        events.call("on_step_begin")

    @guarded
    def on_step_end(self, state: State, metrics: Metrics) -> None:
        """Add TRL's names to the metrics; on_step_end, and on_log where it is due."""
        events, updates = self.events, self.events.schedule.updates
        before = events.state.global_step
        events.count(state.step)
        logs = step_logs(metrics, state.rows, updates, state.config.objective.beta)
        events.entries.append(logs)
        events.losses.append(logs["loss"])
        for name, value in logs.items():
            metrics.setdefault(name, value)
        events.call("on_step_end")
        per_epoch = events.schedule.updates_per_epoch
        if per_epoch and events.state.global_step // per_epoch > before // per_epoch:
            events.call("on_epoch_end")
        if events.is_due(before) or events.control.should_log:
            events.log(merged(events.entries))
            events.entries.clear()
        self.stop = self.stop or events.control.should_training_stop
        self.save = events.control.should_save
        events.control.should_save = events.control.should_evaluate = False

    @guarded
    def on_evaluate(self, state: State, metrics: Metrics) -> None:
        """Log the evaluation under TRL's names, and on_evaluate."""
        logs = self.events.evaluated(state.evaluated, "eval", self.events.sets)
        for name, value in logs.items():
            metrics.setdefault(name, value)
        self.events.log(logs)
        self.events.call("on_evaluate", metrics=logs)
        self.stop = self.stop or self.events.control.should_training_stop

    @guarded
    def on_save(self, state: State) -> None:
        """on_save."""
        self.events.call("on_save")


def bridge_to(events: Events) -> type[Bridge]:
    """Return a callback class for these events."""
    return type("TrainerCallbacks", (Bridge,), {"events": events})


def check_callbacks(callbacks: Any) -> list[Any]:
    """Return the callbacks of GRPOTrainer as a list. Raises TypeError for what is no TrainerCallback."""
    found = list(callbacks or [])
    for callback in found:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise TypeError(f"callbacks has a {kind.__name__}, needs to be transformers.TrainerCallback")
    return found
