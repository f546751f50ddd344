"""FSDP2: weights, gradients and optimizer state in shards, one part per process.

With fsdp_cpu_ram_efficient_loading the main process alone reads the model; the other processes never hold it whole.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from grpo.config.schema import ModelConfig, OptimizerConfig
from grpo.errors import ConfigError
from grpo.kernels.head import LogitTransform
from grpo.models.architecture import logit_transform
from grpo.models.loading import empty_model, load_for_training
from grpo.models.logprob_model import LogprobModel
from grpo.models.strategies.base import (
    FLOAT32_BYTES,
    Machine,
    ModelSize,
    OptimizerState,
    StateMemory,
    Strategy,
    Weights,
)
from grpo.models.strategies.fsdp_agreement import agree_before_collectives, reset
from grpo.runtime.device import is_cpu
from grpo.runtime.distributed import Agreement

PREFIX = "model."
"""The causal LM is the attribute `model` of the `LogprobModel` that is wrapped."""
CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."
"""In layer names under fsdp_activation_checkpointing; torch leaves it out of the names of optimizer state."""


class FullyShardedDataParallel(Strategy):
    """FSDP2, through Accelerate.

    Attributes:
        loads_on_main: The main process alone reads the weights (fsdp_cpu_ram_efficient_loading). Set by `configure`.
        agreement: Of the ranks, before each collective; None in one process, with FSDP1, and with an older torch. Set
            by `prepare`.
    """

    kind = "fsdp2"
    shards_weights = True
    shards_gradients = True
    uses_kernels = False  # weights are whole only while their own module runs
    broadcasts_checkpoint = True

    agreement: Agreement | None = None

    # Launch

    @classmethod
    def is_requested(cls) -> bool:
        return os.environ.get("ACCELERATE_USE_FSDP") == "true"

    @classmethod
    def after_start(cls, accelerator: Accelerator) -> None:
        if is_cpu(accelerator.device):
            _enable_on_cpu(accelerator.mixed_precision)
        if accelerator.is_fsdp2:
            # Accelerate would have FSDP cast all weights, gradients and logprobs to 16 bits, including the head, the
            # norms and the sums over ranks. With autocast alone, sharded training computes what DDP does.
            accelerator.state.fsdp_plugin.mixed_precision_policy = None

    @classmethod
    def matches(cls, accelerator: Accelerator) -> bool:
        return accelerator.distributed_type == DistributedType.FSDP

    # Loading

    def configure(self, model: ModelConfig, optimizer: OptimizerConfig) -> None:
        super().configure(model, optimizer)
        plugin = self.accelerator.state.fsdp_plugin
        on_main = self.accelerator.is_fsdp2 and plugin.cpu_ram_efficient_loading
        self.loads_on_main = bool(on_main) and not model.load_in_4bit

    def load(self, path: str, config: ModelConfig) -> tuple[PreTrainedModel, bool]:
        """With loading on the main process, parameters are on its CPU, and on the meta device of the others."""
        if not self.loads_on_main:
            return super().load(path, config)
        found: tuple[PretrainedConfig, GenerationConfig | None, LogitTransform, bool] | ConfigError | None = None
        if self.accelerator.is_main_process:
            try:
                model, uses_packed_attention = load_for_training(path, config, self.accelerator.device)
                found = (model.config, model.generation_config, logit_transform(model), uses_packed_attention)
            except ConfigError as error:
                found = error
        [found] = broadcast_object_list([found])
        if isinstance(found, ConfigError):
            raise found
        assert found is not None
        if not self.accelerator.is_main_process:
            settings, generation, transform, uses_packed_attention = found
            model = empty_model(settings, path, transform)
            model.generation_config = generation  # type: ignore[assignment]
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = moved = buffer.to(self.accelerator.device)
                    if name not in module._non_persistent_buffers_set:  # it is in the file, like a weight
                        torch.distributed.broadcast(moved, src=0)
        return model, uses_packed_attention

    def replicate(self, model: PreTrainedModel) -> None:
        if not self.loads_on_main:
            return
        if self.accelerator.is_main_process:
            model.to(self.accelerator.device)
        else:
            with _buffers_kept(model):
                model.to_empty(device=self.accelerator.device)
            model.tie_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                torch.distributed.broadcast(parameter, src=0)

    # One optimizer step

    def prepare(self, logprob_model: LogprobModel, optimizer: torch.optim.Optimizer) -> nn.Module:
        module = super().prepare(logprob_model, optimizer)
        can_reset = hasattr(module, "reset_iter_state")  # FSDP2, from torch 2.13 on
        if can_reset and self.accelerator.num_processes > 1:
            self.agreement = agree_before_collectives(module, self.accelerator)
        return module

    @property
    def survives_out_of_memory(self) -> bool:
        return self.agreement is not None

    def agree_on(self, error: BaseException | None) -> BaseException | None:
        return error if self.agreement is None else self.agreement.check(error)

    def discard_gradients(self) -> None:
        super().discard_gradients()
        if self.agreement is not None:
            reset(self.module)

    def _wrap(self, logprob_model: LogprobModel, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Shard a model whose parameters are on the CPU of the main process and on the meta device of the others.

        It is laid out without memory and then filled one parameter at a time. Accelerate's own method would shard
        persistent buffers too, and identifies the optimizer's parameters by their address, which is the same for all on
        the meta device.
        """
        if not self.loads_on_main:
            return super()._wrap(logprob_model, optimizer)
        accelerator, plugin = self.accelerator, self.accelerator.state.fsdp_plugin
        plugin.cpu_ram_efficient_loading = False
        source = logprob_model.state_dict() if accelerator.is_main_process else {}
        with _buffers_kept(logprob_model):
            logprob_model.to("meta")
        _restore_parameters(logprob_model, optimizer)
        prepared = accelerator.prepare(logprob_model, optimizer)
        offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        with _buffers_kept(logprob_model):
            logprob_model.to_empty(device=torch.device("cpu") if offloaded else accelerator.device)
        _restore_parameters(logprob_model, optimizer)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offloaded)
        set_model_state_dict(logprob_model, source, options=options)
        plugin.cpu_ram_efficient_loading = True
        return prepared

    # Weights and checkpoints

    def full_tensor(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else super().full_tensor(tensor)

    def state_dict(self) -> tuple[Weights, OptimizerState]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights = get_model_state_dict(self.module, options=options)
        moments = get_optimizer_state_dict(self.module, self.optimizer, options=options)
        full = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
        return full, moments

    def load_state_dict(self, weights: Weights, moments: OptimizerState) -> None:
        """Each tensor travels alone, so that other ranks never hold more than their shards and one full tensor."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        full: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            full = {PREFIX + name: tensor for name, tensor in weights.items()}
            moments = _by_name(moments, self.module)
        else:
            moments = {}
        set_model_state_dict(self.module, full, options=options)
        set_optimizer_state_dict(self.module, self.optimizer, moments, options=options)

    def load_replicated(self, model: nn.Module, weights: Weights) -> None:
        if self.accelerator.is_main_process:
            model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            for parameter in model.parameters():  # on the CPU where the model is offloaded
                value = parameter.to(self.accelerator.device)
                torch.distributed.broadcast(value, src=0)
                parameter.copy_(value)

    # Memory

    @classmethod
    def machine_of(cls, config: Any) -> Machine | None:
        if config.distributed_type != DistributedType.FSDP:
            return None
        return Machine(
            cls.kind,
            int(config.num_processes),
            str(config.mixed_precision),
            bool(config.use_cpu),
            reads_once=bool(config.fsdp_config.get("fsdp_cpu_ram_efficient_loading")),
            offloads=bool(config.fsdp_config.get("fsdp_offload_params")),
        )

    @classmethod
    def memory(cls, size: ModelSize, machine: Machine) -> StateMemory:
        shard = 0.0 if machine.offloads and not machine.cpu else 1 / machine.processes
        start: float = size.loaded_bytes
        if machine.reads_once and not machine.cpu:  # one weight at a time comes from the main process
            start = size.loaded_bytes / size.total * size.largest_weight
        return StateMemory(
            weights=(size.loaded_bytes + size.adapter_bytes) * shard,
            gradients=FLOAT32_BYTES * size.trained * shard,
            optimizer=2 * FLOAT32_BYTES * size.trained * shard,
            released=FLOAT32_BYTES * size.trained * shard,
            gathered=2 * FLOAT32_BYTES * size.largest_unit,  # of a layer and of the next one, before autocast
            start=start,
        )


def _enable_on_cpu(precision: str) -> None:
    """Set up FSDP2 over gloo. Accelerate selects FSDP on accelerators only and would run DDP without a word.

    All of its FSDP2 code works on a CPU: so fsdp2.yaml can be tested without a GPU.
    """
    plugin = FullyShardedDataParallelPlugin()
    if precision != "no":
        plugin.set_mixed_precision(precision)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # only the driver of an accelerator can pin memory
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Restore the buffers of `module` afterwards, so that only parameters move within."""
    kept = [(part, dict(part._buffers)) for part in module.modules()]
    yield
    for part, buffers in kept:
        part._buffers.update(buffers)


def _restore_parameters(logprob_model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Tie weights again, and give the optimizer the new parameters: one per name after a move to another device."""
    logprob_model.model.tie_weights()  # type: ignore[operator, union-attr]
    [group] = optimizer.param_groups
    group["params"] = [parameter for parameter in logprob_model.parameters() if parameter.requires_grad]


def _by_name(moments: OptimizerState, logprob_model: nn.Module) -> OptimizerState:
    """Return optimizer state with parameter names as keys, where a run without shards has saved numbers."""
    names = [name for name, parameter in logprob_model.named_parameters() if parameter.requires_grad]
    names = [name.replace(CHECKPOINT_WRAPPER, "") for name in names]
    [group] = moments["param_groups"]
    if group["params"] != list(range(len(names))):
        return moments
    by_name = {names[number]: state for number, state in moments["state"].items()}
    return {"state": by_name, "param_groups": [group | {"params": names}]}
