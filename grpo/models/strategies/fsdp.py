"""Sharding: a model that only the main process has read -> FSDP2's shards of it on every rank; and the state of a sharded model
and its optimizer, whole on the main process -> shards again, on any number of ranks.

Names are the plain model's, so a checkpoint can be resumed with another number of processes, or without FSDP's help.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import PreTrainedModel

PREFIX = "model."
"""The live model is the `model` of the logprob_model that is wrapped."""
WRAPPED = "_checkpoint_wrapped_module."
"""In the name of a layer under fsdp_activation_checkpointing; torch leaves it out of the names of an optimizer's state."""


def reads_once(accelerator: Accelerator) -> bool:
    """Whether the main process is to read the weights for all: fsdp_cpu_ram_efficient_loading, with FSDP2."""
    return bool(accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading)


def shard(
    accelerator: Accelerator, logprob_model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare` for a logprob_model with its parameters on the CPU of the main process and the meta device of the others:
    laid out without memory, then filled shard by shard, one parameter at a time.

    Accelerate's own way wants persistent buffers to be shards too, and finds the optimizer's parameters by their address, which
    all of them share on the meta device.
    """
    plugin = accelerator.state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = False
    source = logprob_model.state_dict() if accelerator.is_main_process else {}
    with _buffers_kept(logprob_model):
        logprob_model.to("meta")
    retie(logprob_model)
    trains(optimizer, logprob_model)
    prepared = accelerator.prepare(logprob_model, optimizer)
    offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    with _buffers_kept(logprob_model):
        logprob_model.to_empty(device=torch.device("cpu") if offloaded else accelerator.device)
    retie(logprob_model)
    trains(optimizer, logprob_model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offloaded)
    set_model_state_dict(logprob_model, source, options=options)
    plugin.cpu_ram_efficient_loading = True
    return prepared


def broadcast_weights(model: PreTrainedModel, device: torch.device) -> None:
    """A model with its parameters on the CPU of the main process and the meta device of the others -> whole, on `device`, everywhere.
    Collective."""
    if torch.distributed.get_rank() == 0:
        model.to(device)  # type: ignore[arg-type]
    else:
        with _buffers_kept(model):
            model.to_empty(device=device)
        model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.distributed.broadcast(parameter, src=0)


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Within, parameters may move; afterwards, buffers are what they were."""
    kept = [(part, dict(part._buffers)) for part in module.modules()]
    yield
    for part, buffers in kept:
        part._buffers.update(buffers)


def retie(logprob_model: nn.Module) -> None:
    """A parameter that moves to another kind of device becomes a new one under each of its names."""
    logprob_model.model.tie_weights()  # type: ignore[operator, union-attr]


def trains(optimizer: torch.optim.Optimizer, logprob_model: nn.Module) -> None:
    [group] = optimizer.param_groups
    group["params"] = [parameter for parameter in logprob_model.parameters() if parameter.requires_grad]


def full_state(logprob_model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights that are trained, optimizer state by weight name), on the CPU of the main process, empty elsewhere."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(logprob_model, options=options)
    moments = get_optimizer_state_dict(logprob_model, optimizer, options=options)
    whole = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    return whole, moments


def load_full_state(
    logprob_model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], moments: dict[str, Any]
) -> None:
    """What full_state gave, or a run that was not sharded saved (its optimizer state is by number), on the main process; what the
    others pass is not looked at. Each tensor travels alone, so that the others never hold more than their shards and one of them.
    Collective."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    whole: dict[str, Tensor] = {}
    if torch.distributed.get_rank() == 0:
        whole = {PREFIX + name: tensor for name, tensor in weights.items()}
        moments = _by_name(moments, logprob_model)
    else:
        moments = {}
    set_model_state_dict(logprob_model, whole, options=options)  # type: ignore[arg-type]
    set_optimizer_state_dict(logprob_model, optimizer, moments, options=options)


def _by_name(moments: dict[str, Any], logprob_model: nn.Module) -> dict[str, Any]:
    """The state of an optimizer over the trained parameters in their order, its numbers turned into names."""
    names = [name for name, parameter in logprob_model.named_parameters() if parameter.requires_grad]
    names = [name.replace(WRAPPED, "") for name in names]
    [group] = moments["param_groups"]
    if group["params"] != list(range(len(names))):
        return moments
    by_name = {names[number]: state for number, state in moments["state"].items()}
    return {"state": by_name, "param_groups": [group | {"params": names}]}


def load_everywhere(module: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Put the main process's `tensors` into a module that every process holds whole, and that may lie elsewhere than on `device`,
    where processes talk. Collective."""
    if torch.distributed.get_rank() == 0:
        module.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        for parameter in module.parameters():
            value = parameter.to(device)
            torch.distributed.broadcast(value, src=0)
            parameter.copy_(value)
