"""Callbacks: your own code at four moments of a run, mostly to add a metric.

    # my_callbacks.py                                  # --callbacks '[my_callbacks.py:Digits]'
    from grpo.run.callbacks import Callback

    class Digits(Callback):
        def on_step_end(self, state, metrics):
            metrics["my/digits"] = sum(c.isdigit() for row in state.rows for c in row["completion"]) / len(state.rows)

What it adds stands in metrics.jsonl and in every tracker. A callback that fails is switched off with one warning, and
training goes on. Callbacks run on every process (so that they may use collectives); the main process's numbers are kept.
"""

import logging
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
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
"""A step's metrics. A callback may add keys, and may not change those that are there: they are what was measured."""


@dataclass(frozen=True)
class State:
    """What a callback sees of the run. `model` and `optimizer` are the live ones: look, don't touch."""

    step: int
    """Steps done; 0 before the first."""
    steps: int
    """Steps that the run will have done at its end."""
    rows: list[dict[str, Any]]
    """This step's completions of every process, as rollouts.jsonl has them; [] where there was no step."""
    run_dir: Path
    config: Config
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    strategy: Strategy


class Callback:
    """Inherit from it and override what you need. It is made once, without arguments, before any weight loads."""

    def on_train_begin(self, state: State) -> None:
        """Everything is loaded, no step is done (or, after a resume, `state.step` are)."""

    def on_step_end(self, state: State, metrics: Metrics) -> None:
        """The weights are updated. `metrics` holds the whole step; add to it."""

    def on_evaluate(self, state: State, metrics: Metrics) -> None:
        """After a held-out evaluation (at step 0 too). `metrics` holds eval/... beside the step's; add to it."""

    def on_train_end(self, state: State) -> None:
        """The run is over, however it ended: done, stopped or failed. Not for collectives: other processes may be gone."""


_MOMENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))

CALLBACKS: Registry[type[Callback]] = Registry("callback")
register_callback = CALLBACKS.register


def build_callbacks(names: list[str]) -> list[Callback]:
    """Registered names, package.module:Class or path/file.py:Class. Raises ConfigError for what is no callback."""
    return [_build(name) for name in names]


def _build(name: str) -> Callback:
    kind = CALLBACKS.get(name)
    if not (isinstance(kind, type) and issubclass(kind, Callback)):
        raise ConfigError(f"callbacks has '{name}', which is no class that inherits from grpo.run.callbacks.Callback")
    for method in dir(kind):
        if method.startswith("on_") and method not in _MOMENTS:
            raise ConfigError(
                f"callbacks has '{name}' with the method {method}, which nobody calls: {', '.join(_MOMENTS)}"
            )
    try:
        return kind()
    except Exception as error:
        raise ConfigError(f"callbacks has '{name}', which cannot be made without arguments: {error!r}") from error


class Callbacks:
    """All callbacks of a run, called in the config's order. One that fails on any process is switched off on all."""

    def __init__(self, names: list[str], callbacks: list[Callback], accelerator: Accelerator) -> None:
        self._active = dict(zip(names, callbacks, strict=True))
        self._accelerator = accelerator

    def begin(self, state: State) -> None:
        for name, callback in list(self._active.items()):
            self._agree(name, self._guarded(name, callback.on_train_begin, state))

    def after_step(
        self, state: State, metrics: dict[str, float], *, trained: bool, evaluated: bool
    ) -> dict[str, float]:
        """`metrics` with what the callbacks add. Collective where there are callbacks: every rank must call it."""
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
        """Whether `action` went well."""
        try:
            action(*arguments)
        except Exception as error:  # whatever somebody's extra code does, training is worth more
            _log.warning(
                "callback %s failed and is switched off: %s: %s. Training goes on", name, type(error).__name__, error
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
    """gradient/<layer>: norm of each layer's gradient as the optimizer got it, so after clipping; the mean over the step's
    optimizer steps. A step that was skipped has none."""

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
