"""Sharding: the state of an FSDP2 model and its optimizer, whole on the main process -> the same again on any number of ranks.

Names are the plain model's, so a checkpoint can be resumed with another number of processes, or without FSDP's help.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

PREFIX = "model."
"""The live model is the `model` of the scorer that is wrapped."""


def full_state(scorer: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights that are trained, optimizer state by weight name), on the CPU of the main process, empty elsewhere."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(scorer, options=options)
    moments = get_optimizer_state_dict(scorer, optimizer, options=options)
    whole = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    return whole, moments


def load_full_state(
    scorer: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], moments: dict[str, Any]
) -> None:
    """What full_state gave, on every rank."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(scorer, {PREFIX + name: tensor for name, tensor in weights.items()}, options=options)
    set_optimizer_state_dict(scorer, optimizer, moments, options=options)
