"""One process, or several that each hold the whole model (DDP)."""

from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from grpo.errors import ConfigError
from grpo.models.architecture import vocabulary_size
from grpo.models.logprob_model import LogprobModel, probe_batch
from grpo.models.strategies.base import (
    FLOAT32_BYTES,
    Machine,
    ModelSize,
    OptimizerState,
    StateMemory,
    Strategy,
    Weights,
)
from grpo.runtime.device import has_fused_optimizer
from grpo.runtime.distributed import error_of_any


class DistributedDataParallel(Strategy):
    """Every process holds the whole model; gradients are summed over processes."""

    kind = "ddp"
    batches_are_local = True

    @classmethod
    def is_requested(cls) -> bool:
        return True

    @classmethod
    def matches(cls, accelerator: Accelerator) -> bool:
        return True

    @property
    def fused_optimizer(self) -> bool | None:
        return True if has_fused_optimizer(self.accelerator.device) and self.accelerator.scaler is None else None

    @property
    def survives_out_of_memory(self) -> bool:
        return True

    def agree_on(self, error: BaseException | None) -> BaseException | None:
        return error_of_any(self.accelerator, error)

    def exchange_gradients(self) -> None:
        """DDP exchanges gradients in a backward pass: that of a few tokens without weight, which needs no memory.

        A rank that ran out of memory in a backward pass with an exchange would leave the others waiting.
        """
        if self.accelerator.num_processes == 1:
            return
        batch = probe_batch(vocabulary_size(self.model)).to(self.accelerator.device)
        with self.autocast():
            logprobs, entropies = self.module(batch)
        self.backward(0.0 * (logprobs.sum() + entropies.sum()))

    def discard_gradients(self) -> None:
        super().discard_gradients()
        if isinstance(self.module, nn.parallel.DistributedDataParallel):
            # A forward pass that failed did not clear it, and all ranks must agree on whether buffers are sent.
            self.module.require_forward_param_sync = True

    def state_dict(self) -> tuple[Weights, OptimizerState]:
        weights = dict(self.model.state_dict())
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if any(not parameter.requires_grad for parameter in self.model.parameters()):  # an adapter
            weights = {name: tensor for name, tensor in weights.items() if name in trained}
        return weights, self.optimizer.state_dict()

    def load_state_dict(self, weights: Weights, moments: OptimizerState) -> None:
        unknown = self.model.load_state_dict(weights, strict=False).unexpected_keys
        if unknown:
            raise ConfigError(
                f"the checkpoint holds {unknown[0]} and {len(unknown) - 1} more weights that this model does not have: "
                f"resume with the lora.* and model.name that the run was started with"
            )
        if all(parameter.requires_grad for parameter in self.model.parameters()):
            self.model.tie_weights()
        self.optimizer.load_state_dict(moments)

    @classmethod
    def machine_of(cls, config: Any) -> Machine | None:
        return Machine(cls.kind, int(config.num_processes), str(config.mixed_precision), bool(config.use_cpu))

    @classmethod
    def memory(cls, size: ModelSize, machine: Machine) -> StateMemory:
        gradients = FLOAT32_BYTES * size.trained
        return StateMemory(
            weights=size.loaded_bytes + size.adapter_bytes,
            # The buckets that ranks exchange are a second copy: accelerate leaves gradient_as_bucket_view off.
            gradients=2 * gradients,
            optimizer=2 * FLOAT32_BYTES * size.trained,
            released=gradients,
        )


class SingleProcess(DistributedDataParallel):
    """One process, without a wrapper around the model."""

    kind = "single"

    @classmethod
    def is_requested(cls) -> bool:
        return False  # known once processes have started

    @classmethod
    def matches(cls, accelerator: Accelerator) -> bool:
        return accelerator.distributed_type == DistributedType.NO

    def _wrap(self, logprob_model: LogprobModel, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        wrapped, prepared_optimizer = super()._wrap(logprob_model, optimizer)
        self._is_plain = wrapped is logprob_model  # not compiled
        logprob_model.accumulate_grads_inplace = self._is_plain
        return wrapped, prepared_optimizer

    @property
    def supports_shared_prompts(self) -> bool:
        return self._is_plain

    def clip_and_step(self, usable: bool) -> tuple[float, bool]:
        result = super().clip_and_step(usable)
        self.logprob_model.prompts.forget()
        return result

    @classmethod
    def machine_of(cls, config: Any) -> Machine | None:
        return super().machine_of(config) if config.distributed_type == DistributedType.NO else None

    @classmethod
    def memory(cls, size: ModelSize, machine: Machine) -> StateMemory:
        return StateMemory(
            weights=size.loaded_bytes + size.adapter_bytes,
            gradients=FLOAT32_BYTES * size.trained,
            optimizer=2 * FLOAT32_BYTES * size.trained,
            released=FLOAT32_BYTES * size.trained,
        )
