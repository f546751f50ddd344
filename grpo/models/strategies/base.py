"""Distribution strategies: how one model is trained by one or several processes.

A strategy is one class in a file of this package and one entry of `STRATEGIES` (registry.py). Nothing else asks which
strategy it is. Names in a state dict are those of the plain model, so that a run can be resumed with another strategy.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.config.schema import ModelConfig, OptimizerConfig
from grpo.models.loading import load_for_training
from grpo.models.logprob_model import LogprobModel
from grpo.models.optimizers import allocate_moments
from grpo.models.weights import WeightReader
from grpo.runtime.precision import MIXED_PRECISION

FLOAT32_BYTES = 4
NO_WEIGHT_CACHE = AutocastKwargs(cache_enabled=False)
"""Autocast that drops the 16-bit copy of a weight after its product. By default it keeps all of them until the end of
the forward pass, which reads each once."""
Weights = dict[str, Tensor]
OptimizerState = dict[str, Any]
"""As `torch.optim.Optimizer.state_dict`: {"state": ..., "param_groups": ...}, keyed by parameter number or by name."""


@dataclass(frozen=True)
class Machine:
    """The part of an accelerate config file that memory depends on."""

    kind: str = "single"
    """The `kind` of a strategy: single, ddp, fsdp2, zero2, zero3."""
    processes: int = 1
    precision: str = "no"
    cpu: bool = True
    reads_once: bool = False
    """The main process alone reads the weights, on its CPU (fsdp_cpu_ram_efficient_loading)."""
    offloads: bool = False
    """Shards of weights, gradients and moments stay in the machine's memory (fsdp_offload_params)."""

    @property
    def compute(self) -> torch.dtype | None:
        """The dtype of mixed precision; None where it is off."""
        return MIXED_PRECISION.get(self.precision)


@dataclass(frozen=True)
class ModelSize:
    """Numbers of weights; `loaded_bytes` in bytes."""

    total: int
    trained: int
    largest_weight: int
    largest_unit: int
    """Weights of the largest part that is gathered at once: a layer, or the embedding."""
    loaded_bytes: int
    """Bytes of the weights as they are loaded, without adapter."""
    adapter_bytes: int


@dataclass(frozen=True)
class StateMemory:
    """Bytes on each process."""

    weights: float
    """Live weights and the masters behind them."""
    gradients: float
    optimizer: float
    released: float
    """Part of `gradients` that is freed while the engine samples."""
    gathered: float = 0.0
    """Weights that are whole only while their layer computes."""
    start: float | None = None
    """Weights that a process holds before they are sharded; None where they never are."""


class Strategy(WeightReader, ABC):
    """Base class: everything that Accelerate does alike with and without wrappers around the model.

    The order of calls is `configure`, `load`, `prepare`, and then per optimizer step, for each batch, `accumulate`,
    `autocast` (around the forward pass of `module`), `backward`; then `clip_and_step`.

    Attributes:
        accelerator: The Accelerator of the run.
        module: The trained `LogprobModel`, wrapped; set by `prepare`.
        optimizer: The optimizer itself, not Accelerate's wrapper; set by `prepare`.
    """

    kind: ClassVar[str]
    """Name in memory estimates, see `Machine.kind`."""
    shards_weights: ClassVar[bool] = False
    """A process holds only a part of the live weights."""
    shards_gradients: ClassVar[bool] = False
    """A process holds only a part of the gradients."""
    casts_weights: ClassVar[bool] = False
    """Live weights are rounded to the compute dtype, with float32 masters behind them."""
    broadcasts_checkpoint: ClassVar[bool] = False
    """`load_state_dict` takes the tensors of the main process; other ranks pass none."""
    batches_are_local: ClassVar[bool] = False
    """Batches involve no other process: `exchange_gradients` adds up the gradients after the last one of a step."""
    exposes_gradients: ClassVar[bool] = True
    """Parameters have `.grad` when the optimizer steps."""
    exposes_weights: ClassVar[bool] = True
    """Writing to a parameter, or to this process's shard of it, changes the live weights."""
    uses_kernels: ClassVar[bool] = True
    """Layers may be computed from their description instead of by their modules (grpo/kernels/layers.py)."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.logprob_model: LogprobModel
        self.module: nn.Module
        self.model: PreTrainedModel
        self.optimizer: torch.optim.Optimizer
        self.prepared_optimizer: Any
        self.max_grad_norm = 0.0

    # Launch

    @classmethod
    @abstractmethod
    def is_requested(cls) -> bool:
        """Return whether the environment of this process, set by `accelerate launch`, requests this strategy."""

    @classmethod
    def before_start(cls, on_cpu: bool, process_group: InitProcessGroupKwargs) -> bool:
        """Adapt the process group and return the `cpu` argument of the Accelerator. Called before it is created."""
        return on_cpu

    @classmethod
    def after_start(cls, accelerator: Accelerator) -> None:
        """Adapt the Accelerator just created."""

    @classmethod
    @abstractmethod
    def matches(cls, accelerator: Accelerator) -> bool:
        """Return whether `accelerator` was set up for this strategy."""

    # Loading

    def configure(self, model: ModelConfig, optimizer: OptimizerConfig) -> None:
        """Set up the strategy before any model is created.

        Raises:
            ConfigError: The accelerate config asks for something that is not supported.
        """
        self.max_grad_norm = optimizer.max_grad_norm or math.inf

    def load(self, path: str, config: ModelConfig) -> tuple[PreTrainedModel, bool]:
        """Load a model that `prepare` will take. Collective.

        Returns:
            The model, and whether it uses packed attention.

        Raises:
            ConfigError: On every rank, if the model cannot be loaded or is not supported.
        """
        model, uses_packed_attention = load_for_training(path, config, self.accelerator.device)
        return model.to(self.accelerator.device), uses_packed_attention

    def replicate(self, model: PreTrainedModel) -> None:
        """Put all weights of a model that `load` returned, or a copy of it, on this process's device. Collective."""

    @property
    def fused_optimizer(self) -> bool | None:
        """The `fused` argument of torch's optimizers; None lets torch choose."""
        return None

    def prepare(self, logprob_model: LogprobModel, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Distribute a model and its optimizer.

        Returns:
            The wrapped module to call instead of `logprob_model`.
        """
        self.logprob_model, self.model, self.optimizer = logprob_model, logprob_model.model, optimizer
        self.module, self.prepared_optimizer = self._wrap(logprob_model, optimizer)
        if self.exposes_gradients:
            allocate_moments(optimizer)
        return self.module

    def _wrap(self, logprob_model: LogprobModel, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        handler = self.accelerator.autocast_handler
        self.accelerator.autocast_handler = NO_WEIGHT_CACHE  # of the wrapper's own autocast
        try:
            return self.accelerator.prepare(logprob_model, optimizer)
        finally:
            self.accelerator.autocast_handler = handler

    @property
    def supports_shared_prompts(self) -> bool:
        """Batches of one step may share the forward pass of a prompt, so that ranks call layers unequally often."""
        return False

    @classmethod
    def holds_rounded_weights(cls) -> bool:
        """Return whether live weights are whole and in the compute dtype, so that engines can sample from them."""
        return cls.casts_weights and not cls.shards_weights

    @property
    def holds_exact_weights(self) -> bool:
        """The live weights are whole on every process, and are what the optimizer updates."""
        return not (self.shards_weights or self.casts_weights)

    # One optimizer step

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of mixed precision. FSDP2's wrapper, unlike DDP's, does not enter it by itself."""
        return self.accelerator.autocast(NO_WEIGHT_CACHE)

    @property
    def survives_out_of_memory(self) -> bool:
        """All ranks can repeat the batches of a step if memory runs out on one of them. See `agree_on`."""
        return self.accelerator.num_processes == 1

    def agree_on(self, error: BaseException | None) -> BaseException | None:
        """Return an error on every rank if memory has run out on any of them, else None. Collective.

        Args:
            error: The error of this rank. Call this at once after it is caught, or after the last batch.
        """
        return error

    def exchange_gradients(self) -> None:
        """Add up the gradients of all ranks where `batches_are_local`. Collective."""

    def discard_gradients(self) -> None:
        """Drop the gradients of an optimizer step that was not completed."""
        self.prepared_optimizer.zero_grad()
        self.logprob_model.prompts.forget()

    @contextlib.contextmanager
    def accumulate(self, *, sync: bool) -> Iterator[None]:
        """Run one batch within. Ranks exchange gradients only where `sync` is true: at the last batch of a step."""
        with contextlib.nullcontext() if sync else self.accelerator.no_sync(self.module):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a sum divided by counts over all ranks, to the gradients of all ranks."""
        # Wrappers average over ranks, but gradients of such a loss must be added up.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def clip_and_step(self, usable: bool) -> tuple[float, bool]:
        """Clip gradients, update weights, clear gradients.

        Args:
            usable: False on all ranks if the loss of any rank is not finite: nothing is updated then.

        Returns:
            The gradient norm before clipping, and whether no fault occurred. With a loss scale, an overflow that lowers
            the scale is no fault.
        """
        parameters = self.module.parameters()
        norm = float(self.full_tensor(self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm)))
        taken = usable and math.isfinite(norm)
        if self.accelerator.scaler is not None:  # it looks for overflow itself, skips the step and lowers the scale
            taken = usable and (taken or self.accelerator.scaler.get_scale() > 1)
            self.prepared_optimizer.step()
        elif taken:
            self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad()
        return norm, taken

    # Checkpoints

    @abstractmethod
    def state_dict(self) -> tuple[Weights, OptimizerState]:
        """Return the trained weights by plain name and the optimizer's state, on the main process. Collective."""

    @abstractmethod
    def load_state_dict(self, weights: Weights, moments: OptimizerState) -> None:
        """Restore what `state_dict` of this or another strategy returned. Collective.

        Raises:
            ConfigError: The weights belong to another model.
        """

    def load_replicated(self, model: nn.Module, weights: Weights) -> None:
        """Load `weights` into a model that every process holds whole. Collective if `broadcasts_checkpoint`."""
        model.load_state_dict(weights, strict=False)

    # Memory

    @classmethod
    @abstractmethod
    def machine_of(cls, config: Any) -> Machine | None:
        """Return what a loaded accelerate config file says of memory, or None if it selects another strategy."""

    @classmethod
    @abstractmethod
    def memory(cls, size: ModelSize, machine: Machine) -> StateMemory:
        """Estimate the bytes of weights, gradients and optimizer state on each process."""
