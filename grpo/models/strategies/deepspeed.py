"""DeepSpeed ZeRO (Rajbhandari et al., arXiv 1910.02054). This is the only file that knows DeepSpeed.

    ZeRO-2     every process holds the weights in the compute dtype, and a part of gradients, masters and moments
    ZeRO-3     the weights are in parts as well

DeepSpeed's engine owns backward, clipping, the optimizer step and the float32 master weights.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from grpo.config.schema import ModelConfig, OptimizerConfig
from grpo.errors import ConfigError
from grpo.models.logprob_model import LogprobModel
from grpo.models.optimizers import ADAMW, ADAMW_NAMES
from grpo.models.strategies.base import (
    FLOAT32_BYTES,
    Machine,
    ModelSize,
    OptimizerState,
    StateMemory,
    Strategy,
    Weights,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by the optimizer's own names."""


class Zero2(Strategy):
    """ZeRO-2, through Accelerate."""

    kind = "zero2"
    shards_gradients = True
    casts_weights = True
    exposes_gradients = False
    exposes_weights = False  # ZeRO-3 partitions them, and masters are what the optimizer updates
    # ZeRO-3 gathers a weight while its own module runs. Both stages sum gradients in the order in which they arrive.
    uses_kernels = False

    # Launch

    @classmethod
    def is_requested(cls) -> bool:
        return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"

    @classmethod
    def before_start(cls, on_cpu: bool, process_group: InitProcessGroupKwargs) -> bool:
        if on_cpu:  # deepspeed_zero*.yaml is tested so without a GPU; with `cpu`, Accelerate would run DDP
            process_group.backend = "gloo"
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return False

    @classmethod
    def matches(cls, accelerator: Accelerator) -> bool:
        return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)

    # Loading

    def configure(self, model: ModelConfig, optimizer: OptimizerConfig) -> None:
        """Pass our settings to DeepSpeed, and have transformers create models whole.

        Under ZeRO-3 transformers would create every model in parts: plain copies, the reference and probes as well.
        `prepare` partitions the one that is trained.
        """
        super().configure(model, optimizer)
        unset_hf_deepspeed_config()
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        place = settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
        if place != "none":
            raise ConfigError(
                f"offload_optimizer_device is {place}: DeepSpeed would then put an optimizer of its own in the place "
                f"of ours, which the learning rate's schedule and the checkpoints would not reach. Set it to none, and "
                f"lora.r or more GPUs where memory is short"
            )
        if optimizer.optim not in ADAMW_NAMES:
            raise ConfigError(
                f"optimizer.optim is {optimizer.optim}, but a checkpoint of DeepSpeed's shards holds the moments of "
                f"{ADAMW} only: set optimizer.optim to {ADAMW}, or use accelerate_configs/fsdp2.yaml"
            )
        settings["train_micro_batch_size_per_gpu"] = 1  # only used to print throughput
        settings["gradient_clipping"] = optimizer.max_grad_norm
        settings["steps_per_print"] = 10**9

    def _wrap(self, logprob_model: LogprobModel, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        prepared = super()._wrap(logprob_model, optimizer)
        head = self.model.get_output_embeddings()
        if _is_partitioned(next(head.parameters())):
            import deepspeed

            # The head is never called: ZeRO-3 must gather its weight for the module that reads it.
            for parameter in head.parameters():
                deepspeed.zero.register_external_parameter(logprob_model, parameter)
        return prepared

    # One optimizer step

    @contextlib.contextmanager
    def accumulate(self, *, sync: bool) -> Iterator[None]:
        self._last_of_step = sync
        with super().accumulate(sync=sync):
            yield

    _last_of_step = True

    def backward(self, loss: Tensor) -> None:
        engine: Any = self.module
        loss = loss * self.accelerator.num_processes
        if not math.isfinite(float(loss.detach())):
            loss = loss * math.nan  # reaches the gradients of every rank, so that all of them skip the step
        engine.set_gradient_accumulation_boundary(self._last_of_step)
        engine.backward(loss)

    def clip_and_step(self, usable: bool) -> tuple[float, bool]:
        """`usable` is not needed: `backward` has turned a loss that is not finite into gradients that are not."""
        engine: Any = self.module
        engine.optimizer.check_grad_overflow = True  # in float32 too, where DeepSpeed would not look
        engine.step()
        norm = math.inf if engine.optimizer.overflow else float(engine.get_global_grad_norm() or 0.0)
        return norm, math.isfinite(norm)

    # Weights and checkpoints

    @contextlib.contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        if not any(map(_is_partitioned, parameters)):
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield

    def full_tensor(self, tensor: Tensor) -> Tensor:
        full = super().full_tensor(tensor)
        return full.clone() if _is_partitioned(tensor) else full  # DeepSpeed frees it at the end of `gathered`

    def master_weight(self, parameter: nn.Parameter) -> Tensor:
        master = _master(parameter)
        return self.full_tensor(parameter) if master is None else master

    def numel(self, parameter: nn.Parameter) -> int:
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    def state_dict(self) -> tuple[Weights, OptimizerState]:
        """Return trained weights in float32 and optimizer state by weight name, on the CPU of every rank."""
        from deepspeed.utils import safe_get_full_optimizer_state

        weights: Weights = {}
        state: dict[str, Weights] = {}
        steps = [moments["step"] for moments in self.optimizer.state.values() if "step" in moments]
        for name, parameter in self._trained():
            weights[name] = _on_cpu(_master(parameter))
            if steps:
                state[name] = {key: _on_cpu(safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS}
                state[name]["step"] = _on_cpu(steps[0])
        [group] = self.optimizer.param_groups
        settings = {key: value for key, value in group.items() if key != "params"}
        return weights, {"state": state, "param_groups": [settings | {"params": list(weights)}]}

    def load_state_dict(self, weights: Weights, moments: OptimizerState) -> None:
        """Optimizer state may be keyed by weight name, or by number as a run without DeepSpeed saves it."""
        import deepspeed

        saved = moments["state"]
        order = moments["param_groups"][0]["params"]
        by_name = {name: saved.get(key) for (name, _), key in zip(self._trained(), order, strict=True)}
        if saved:
            self._create_moments(next(iter(saved.values()))["step"])
        for name, parameter in self._trained():
            value = weights[name].to(parameter.device)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(value)
            _set_master(parameter, value.float())
            for key in MOMENTS if by_name[name] else ():
                _set_master(parameter, by_name[name][key].to(parameter.device), key)
        for group, settings in zip(self.optimizer.param_groups, moments["param_groups"], strict=True):
            group.update({key: value for key, value in settings.items() if key != "params"})

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def _create_moments(self, step: Tensor) -> None:
        """Create AdamW's moments, which would only exist after its first step."""
        engine: Any = self.module
        parts = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # of ZeRO-3
        for part in engine.optimizer.single_partition_of_fp32_groups if parts is None else parts:
            self.optimizer.state[part] = {"step": step.clone(), **{key: torch.zeros_like(part) for key in MOMENTS}}
        if parts is None:
            engine.optimizer._lazy_init_hp_params_optimizer_state()

    # Memory

    @classmethod
    def machine_of(cls, config: Any) -> Machine | None:
        if config.distributed_type != DistributedType.DEEPSPEED:
            return None
        return Machine(cls.kind, int(config.num_processes), str(config.mixed_precision), bool(config.use_cpu))

    @classmethod
    def memory(cls, size: ModelSize, machine: Machine) -> StateMemory:
        live: float = (size.loaded_bytes + size.adapter_bytes) / (2 if machine.compute else 1)
        part = FLOAT32_BYTES * size.trained / machine.processes
        return StateMemory(weights=live + part, gradients=part, optimizer=2 * part, released=part)


class Zero3(Zero2):
    """ZeRO-3, through Accelerate."""

    kind = "zero3"
    shards_weights = True

    @classmethod
    def matches(cls, accelerator: Accelerator) -> bool:
        return super().matches(accelerator) and int(accelerator.state.deepspeed_plugin.zero_stage) == 3

    @classmethod
    def machine_of(cls, config: Any) -> Machine | None:
        machine = super().machine_of(config)
        return machine if machine is not None and int(config.deepspeed_config["zero_stage"]) == 3 else None

    @classmethod
    def memory(cls, size: ModelSize, machine: Machine) -> StateMemory:
        live: float = (size.loaded_bytes + size.adapter_bytes) / (2 if machine.compute else 1)
        part = FLOAT32_BYTES * size.trained / machine.processes
        return StateMemory(
            weights=live / machine.processes + part,
            gradients=part,
            optimizer=2 * part,
            released=part,
            gathered=2
            * (2 if machine.compute else FLOAT32_BYTES)
            * size.largest_unit,  # of a layer and of the next one
            start=size.loaded_bytes,
        )


def _is_partitioned(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 has partitioned the parameter."""
    return hasattr(parameter, "ds_id")


def _master(parameter: nn.Parameter) -> Tensor | None:
    """Return the whole float32 master of a trained parameter; None if DeepSpeed does not train it. Collective."""
    if not parameter.requires_grad or not (_is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")):
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    found = safe_get_full_fp32_param(parameter)
    return None if found is None else found.detach()


def _set_master(parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
    """Write this rank's part of the float32 master, or of the moment `key`."""
    from deepspeed import utils

    if not _is_partitioned(parameter):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, key)
        return
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # the same on every rank: the last one is padded
    rank = torch.distributed.get_rank()
    part = nn.functional.pad(whole.flatten(), (0, size * torch.distributed.get_world_size() - whole.numel()))
    part = part[rank * size : (rank + 1) * size]
    if key is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, key)


def _on_cpu(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.detach().to("cpu", copy=True)
