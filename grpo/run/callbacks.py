"""Callbacks: user code at six moments of a run, mostly to add a metric.

    # my_callbacks.py                                  # --callbacks '[my_callbacks.py:Digits]'
    from grpo.run.callbacks import Callback

    class Digits(Callback):
        def on_step_end(self, state, metrics):
            metrics["my/digits"] = sum(c.isdigit() for row in state.rows for c in row["completion"]) / len(state.rows)

Added metrics go to metrics.jsonl and to every tracker. `self.stop = True` ends the training after the step, saved, and
`self.save = True` saves a checkpoint of it; on any process is enough. A callback that fails is disabled with one
warning; training continues. Callbacks run on every process, so that they may use collectives; the main process's
numbers are kept.
"""

import logging
import re
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.schema import Config
from grpo.errors import ConfigError
from grpo.models.strategies.base import Strategy
from grpo.models.weights import WeightReader
from grpo.registry import Registry
from grpo.runtime.distributed import max_over_ranks

_log = logging.getLogger(__name__)

Metrics = MutableMapping[str, float]
"""The metrics of a step. A callback may add keys but not change existing ones."""


@dataclass(frozen=True)
class State:
    """The state of the run as a callback sees it. `model` and `optimizer` are the live ones: do not modify them."""

    step: int
    """Steps done; 0 before the first."""
    steps: int
    """Total number of steps."""
    rows: list[dict[str, Any]]
    """Completions of this step from every process, as in rollouts.jsonl; [] where there was no step."""
    run_dir: Path
    config: Config
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    strategy: Strategy
    evaluated: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the evaluation of this step, as in evaluations.jsonl; [] without one."""


class Callback:
    """Base class: override the hooks you need. It is created once, without arguments, before any weight loads."""

    stop = False
    """Set to True in a hook: training ends after this step, saved."""
    save = False
    """Set to True in a hook: a checkpoint of this step is saved."""

    def on_train_begin(self, state: State) -> None:
        """Called when everything is loaded. `state.step` steps are done: 0, unless the run was resumed."""

    def on_step_begin(self, state: State) -> None:
        """Called before the completions of a step are sampled."""

    def on_step_end(self, state: State, metrics: Metrics) -> None:
        """Called after the weights were updated. `metrics` holds the metrics of the step; add to it."""

    def on_evaluate(self, state: State, metrics: Metrics) -> None:
        """Called after a held-out evaluation, at step 0 too. `metrics` holds eval/... and the step's; add to it."""

    def on_save(self, state: State) -> None:
        """Called after a checkpoint was saved."""

    def on_train_end(self, state: State) -> None:
        """Called at the end, also after a failure. Not for collectives: other processes may have exited."""


_HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))

CALLBACKS: Registry[type[Callback]] = Registry("callback")
register_callback = CALLBACKS.register


def build_callbacks(names: list[str]) -> list[Callback]:
    """Create callbacks by name: a registered one, package.module:Class or path/file.py:Class.

    Raises:
        ConfigError: The name is unknown, or not a callback.
    """
    return [_build(name) for name in names]


def _build(name: str) -> Callback:
    kind = CALLBACKS.get(name)
    if not (isinstance(kind, type) and issubclass(kind, Callback)):
        raise ConfigError(f"callbacks has '{name}', which is not a subclass of grpo.run.callbacks.Callback")
    for method in dir(kind):
        if method.startswith("on_") and method not in _HOOKS:
            raise ConfigError(
                f"callbacks has '{name}' with the method {method}, which is not a supported hook: {', '.join(_HOOKS)}"
            )
    try:
        return kind()
    except Exception as error:
        raise ConfigError(f"callbacks has '{name}', which cannot be created without arguments: {error!r}") from error


class Callbacks:
    """The callbacks of a run, called in the order of the config. One that fails on any process is disabled on all."""

    def __init__(self, names: list[str], callbacks: list[Callback], accelerator: Accelerator) -> None:
        self._active = dict(zip(names, callbacks, strict=True))
        self._accelerator = accelerator

    def begin(self, state: State) -> None:
        self._call("on_train_begin", state)

    def before_step(self, state: State) -> None:
        self._call("on_step_begin", state)

    def saved(self, state: State) -> None:
        self._call("on_save", state)

    def _call(self, hook: str, state: State) -> None:
        for name, callback in list(self._active.items()):
            self._agree(name, self._guarded(name, getattr(callback, hook), state))

    def requests(self) -> tuple[bool, bool]:
        """Return whether a callback on any process asks to stop, and to save. Collective where there are callbacks."""
        if not self._active:
            return False, False
        callbacks = self._active.values()
        stop, save = any(callback.stop for callback in callbacks), any(callback.save for callback in callbacks)
        for callback in callbacks:
            callback.save = False
        number = max_over_ranks(self._accelerator, stop), max_over_ranks(self._accelerator, save)
        return bool(number[0]), bool(number[1])

    def after_step(
        self, state: State, metrics: dict[str, float], *, trained: bool, evaluated: bool
    ) -> dict[str, float]:
        """Return `metrics` with those that the callbacks add. Collective where there are callbacks."""
        metrics = dict(metrics)
        for name, callback in list(self._active.items()):
            seen = dict(metrics)
            moments = [callback.on_step_end] * trained + [callback.on_evaluate] * evaluated
            fine = all(self._guarded(name, moment, state, seen) for moment in moments)
            fine = fine and self._guarded(name, _check_added, metrics, seen)
            if self._agree(name, fine):
                metrics |= {key: float(value) for key, value in seen.items() if key not in metrics}
        return metrics

    def end(self, state: State) -> None:
        for name, callback in self._active.items():
            self._guarded(name, callback.on_train_end, state)
        self._active = {}

    def _guarded(self, name: str, action: Any, *arguments: Any) -> bool:
        """Call `action` and return whether it succeeded."""
        try:
            action(*arguments)
        except Exception as error:  # a failing callback must not stop training
            _log.warning(
                "callback %s failed and is disabled: %s: %s. Training continues", name, type(error).__name__, error
            )
            return False
        return True

    def _agree(self, name: str, fine: bool) -> bool:
        if max_over_ranks(self._accelerator, not fine):
            del self._active[name]
            return False
        return True


def _check_added(before: dict[str, float], after: dict[str, Any]) -> None:
    for key in before:
        if key not in after or not (after[key] is before[key] or after[key] == before[key]):
            raise ValueError(f"it changed '{key}', which is measured: add keys of your own")
    for key in after.keys() - before.keys():
        if not isinstance(key, str) or key == "step":
            raise ValueError(f"it added the key {key!r}: a key is a text, and not 'step'")
        float(after[key])


@register_callback("layer_gradient_norms")
class LayerGradientNorms(Callback):
    """Metric gradient/<layer>: norm of each layer's gradient after clipping, mean over the optimizer steps of a step.

    A skipped step has no value.
    """

    def on_train_begin(self, state: State) -> None:
        if not state.strategy.exposes_gradients:
            raise NotImplementedError("gradients are not accessible with this distribution strategy (DeepSpeed)")
        self._norms: list[dict[str, torch.Tensor]] = []
        state.optimizer.register_step_pre_hook(lambda *_: self._norms.append(layer_norms(state.model, state.strategy)))

    def on_step_end(self, state: State, metrics: Metrics) -> None:
        norms, self._norms = self._norms, []
        for layer in norms[0] if norms else ():
            metrics[f"gradient/{layer}"] = float(torch.stack([step[layer] for step in norms]).mean())


def layer_norms(model: torch.nn.Module, reader: WeightReader) -> dict[str, torch.Tensor]:
    """{"embed_tokens": |g|, "layer_00": |g|, ...}: euclidean norms, scalars, in the model's order."""
    squares: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = reader.full_tensor(torch.linalg.vector_norm(parameter.grad.detach(), dtype=torch.float32))
            squares.setdefault(_layer_of(name), []).append(norm)
    return {layer: torch.linalg.vector_norm(torch.stack(norms)) for layer, norms in squares.items()}


def _layer_of(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> layer_03; model.embed_tokens.weight -> embed_tokens"""
    numbered = re.search(r"\.(\d+)\.", name)
    if numbered:
        return f"layer_{int(numbered[1]):02}"
    parts = [part for part in name.split(".") if part not in ("weight", "bias")]
    return parts[-1]
