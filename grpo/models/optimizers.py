"""Optimizers and learning rate schedules.

# mine.py                                      # --optimizer.optim mine.py:sgd
def sgd(parameters, config, *, fused):
    return torch.optim.SGD(parameters, lr=config.learning_rate, fused=fused)
"""

import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from grpo.config.schema import OptimizerConfig
from grpo.registry import Registry


class OptimizerFactory(Protocol):
    """Creates an optimizer over one group of parameters, with the hyperparameters of `config`."""

    def __call__(
        self, parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, fused: bool | None
    ) -> torch.optim.Optimizer: ...


OPTIMIZERS: Registry[OptimizerFactory] = Registry("optimizer", key="optimizer.optim")
register_optimizer = OPTIMIZERS.register


ADAMW = "adamw_torch"


@register_optimizer(ADAMW)
def adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, fused: bool | None) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101). `fused` None lets torch choose the implementation."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=fused,
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimizerConfig, steps: int) -> LRScheduler:
    """Return the schedule `config.lr_scheduler_type` over `steps` optimizer steps, warm-up included."""
    warmup = math.ceil(config.warmup_ratio * steps)
    return get_scheduler(config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def override_hyperparameters(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, config: OptimizerConfig) -> None:
    """Replace hyperparameters that a checkpoint has restored by those of `config`.

    Schedules other than functions of the step keep the restored ones.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    scheduler.base_lrs = [config.learning_rate] * len(scheduler.base_lrs)
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["initial_lr"] = config.learning_rate
        group["lr"] = config.learning_rate * factor(scheduler.last_epoch)
        options = {"betas": (config.adam_beta1, config.adam_beta2), "weight_decay": config.weight_decay}
        group.update({key: value for key, value in options.items() if key in group})
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
