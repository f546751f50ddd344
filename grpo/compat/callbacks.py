"""Callbacks of transformers: this trainer's hooks -> TrainerCallback events, TrainerState and log_history."""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from grpo.compat.arguments import GRPOConfig
from grpo.compat.batch import Schedule
from grpo.compat.logs import evaluation_logs, merged, step_logs
from grpo.run.callbacks import Callback, Metrics, State

_log = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
"""The TrainerState in each checkpoint, as in TRL."""
CONTINUED = (
    *("log_history", "num_input_tokens_seen", "total_flos", "stateful_callbacks"),
    *("best_metric", "best_global_step", "best_model_checkpoint"),
)
"""Entries of a TrainerState that a resumed run goes on with. The others follow from the step and the config."""


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
    evaluate: Callable[[int], dict[str, float]] | None = None
    """Evaluates after a step for a callback that asks for it, and returns the metrics, as in metrics.jsonl."""

    def __post_init__(self) -> None:
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in self.callbacks]
        self.state.is_world_process_zero = self.state.is_local_process_zero = self.arguments.process_index == 0
        self.state.max_steps = self.schedule.steps * self.schedule.updates
        epoch = self.schedule.updates_per_epoch
        self.state.num_train_epochs = -(-self.state.max_steps // epoch) if epoch else 1
        self.state.logging_steps = int(max(1, self.logging_steps))
        self.state.save_steps, self.state.eval_steps = self._every("save"), self._every("eval")
        self.state.epoch = 0.0

    def _every(self, what: str) -> int:
        """Return save_steps or eval_steps in optimizer steps."""
        every = getattr(self.arguments, f"{what}_steps") or self.arguments.logging_steps
        return max(1, math.ceil(every * self.schedule.max_steps if every < 1 else every))

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
            logs = {**logs, "epoch": self.state.epoch or 0.0}
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
        if self.arguments.logging_strategy != "steps":
            return False
        first = self.arguments.logging_first_step and before == 0
        return first or self.state.global_step // self.logging_steps > before // self.logging_steps

    def ends_epoch(self, before: int) -> bool:
        """Return whether one of the optimizer steps from `before` on is the last one of an epoch."""
        per_epoch = self.schedule.updates_per_epoch
        return bool(per_epoch) and self.state.global_step // per_epoch > before // per_epoch  # type: ignore[operator]

    def note_best(self, logs: dict[str, float]) -> None:
        """Keep the best value of metric_for_best_model in the state, where EarlyStoppingCallback reads it."""
        asked = self.arguments.metric_for_best_model or ""
        value = logs.get(asked if asked.startswith("eval_") else f"eval_{asked}")
        if value is None:
            return
        best, sign = self.state.best_metric, 1 if self.arguments.greater_is_better else -1
        if best is None or sign * value > sign * best:
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint, where that was saved. On the main process."""
        if not self.state.is_world_process_zero or not checkpoint.is_dir():
            return
        states: dict[str, Any] = {}
        for callback in self.callbacks:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = states  # type: ignore[assignment]
        temporary = checkpoint / f".{STATE_FILE}"
        self.state.save_to_json(str(temporary))
        temporary.replace(checkpoint / STATE_FILE)

    def restore(self, checkpoint: Path) -> None:
        """Go on with the state in a checkpoint; with that of callbacks, too, where the arguments say so."""
        try:
            saved = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        except (OSError, ValueError, TypeError) as error:
            _log.warning(
                "state.log_history begins at the checkpoint %s, which has no earlier one: %s", checkpoint, error
            )
            return
        for name in CONTINUED:
            setattr(self.state, name, getattr(saved, name))
        if self.arguments.restore_callback_states_from_checkpoint:
            states = {name: list(found) for name, found in (saved.stateful_callbacks or {}).items()}
            for callback in self.callbacks:
                if isinstance(callback, ExportableState) and states.get(type(callback).__name__):
                    found = states[type(callback).__name__].pop(0)
                    vars(callback).update(found["args"] | found["attributes"])

    def evaluated(self, rows: list[dict[str, Any]], prefix: str, sets: dict[str, int]) -> dict[str, float]:
        """Return the logs of an evaluation: of all prompts together, and of each of `sets` where they have names."""
        logs = evaluation_logs(rows, self.weights, prefix)
        first = 0
        for name, count in sets.items():
            own = [row for row in rows if first <= row["draw"] < first + count]
            logs |= evaluation_logs(own, self.weights, f"{prefix}_{name}") if name else {}
            first += count
        return logs | {f"{prefix}_num_tokens": float(self.state.num_input_tokens_seen)}

    def log_evaluation(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Log an evaluation of the run's own prompts, and call on_evaluate. Returns its logs."""
        logs = self.evaluated(rows, "eval", self.sets)
        self.log(logs)
        self.call("on_evaluate", metrics=logs)
        self.note_best(logs)
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
        per_epoch, control = events.schedule.updates_per_epoch, events.control
        if per_epoch and events.state.global_step % per_epoch < events.schedule.updates:
            events.call("on_epoch_begin")
        control.should_log = control.should_evaluate = control.should_save = False
        events.call("on_step_begin")

    @guarded
    def on_step_end(self, state: State, metrics: Metrics) -> None:
        """Add TRL's names to the metrics; on_step_end and on_epoch_end, and what they ask for."""
        events, updates = self.events, self.events.schedule.updates
        before = events.state.global_step
        events.count(state.step)
        events.state.num_input_tokens_seen += round(metrics["rollout/tokens"])
        logs = step_logs(metrics, state.rows, updates, state.config.objective.beta)
        logs["num_tokens"] = float(events.state.num_input_tokens_seen)
        events.entries.append(logs)
        events.losses.append(logs["loss"])
        for name, value in logs.items():
            metrics.setdefault(name, value)
        events.control.should_log = events.is_due(before)
        events.call("on_step_end")
        self._follow(state, metrics)
        if events.ends_epoch(before):
            events.control.should_log = events.arguments.logging_strategy == "epoch"
            events.call("on_epoch_end")
            self._follow(state, metrics)

    def _follow(self, state: State, metrics: Metrics) -> None:
        """Log and evaluate where it is due or a callback has asked for it; pass on what else one has asked for."""
        events = self.events
        if events.control.should_log and events.entries:
            events.log(merged(events.entries))
            events.entries.clear()
        is_evaluated = any(key.startswith(("eval/", "eval_")) for key in metrics)  # then on_evaluate is called anyway
        if events.control.should_evaluate and not is_evaluated and events.evaluate is not None:
            for name, value in events.evaluate(state.step).items():
                metrics.setdefault(name, value)
        self._note_requests()

    def _note_requests(self) -> None:
        control = self.events.control
        self.stop = self.stop or control.should_training_stop
        self.save = self.save or control.should_save
        control.should_save = control.should_evaluate = False

    @guarded
    def on_evaluate(self, state: State, metrics: Metrics) -> None:
        """Log the evaluation under TRL's names, and on_evaluate."""
        logs = self.events.log_evaluation(state.evaluated)
        for name, value in logs.items():
            metrics.setdefault(name, value)
        self._note_requests()

    @guarded
    def on_save(self, state: State) -> None:
        """Write trainer_state.json into the checkpoint, and on_save."""
        self.events.save(state.run_dir / "checkpoints" / f"step-{state.step}")
        self.events.call("on_save")
        self._note_requests()
        self.save = False  # it was saved


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
