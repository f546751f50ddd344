"""Optimizers and learning rate schedules.

# mine.py                                      # --optimizer.optim mine.py:sgd
def sgd(parameters, config, *, fused):
    return torch.optim.SGD(parameters, lr=config.learning_rate, fused=fused)
"""

import difflib
import importlib.util
import inspect
import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Adafactor, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from grpo.config.schema import Config, OptimizerConfig
from grpo.errors import ConfigError
from grpo.registry import Registry


class OptimizerFactory(Protocol):
    """Creates an optimizer over one group of parameters, with the hyperparameters of `config`."""

    def __call__(
        self, parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, fused: bool | None
    ) -> torch.optim.Optimizer: ...


OPTIMIZERS: Registry[OptimizerFactory] = Registry("optimizer", key="optimizer.optim")
register_optimizer = OPTIMIZERS.register


ADAMW = "adamw_torch"
ADAMW_NAMES = (ADAMW, "adamw_torch_fused")
"""Names of torch's AdamW. The fused implementation is used under both, where there is one for the device."""


@register_optimizer(ADAMW_NAMES[0])
@register_optimizer(ADAMW_NAMES[1])
def adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, fused: bool | None) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101). `fused` None lets torch choose the implementation."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Create the moments of torch's AdamW, which would do so in its first step.

    The sampler takes a share of the memory that is free before that step, and memory that runs out within a step cannot
    be survived. Other optimizers are left alone.
    """
    if type(optimizer) is not torch.optim.AdamW:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter]:
                continue
            place = parameter.device if group["fused"] else torch.device("cpu")
            moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=place), **moments}


@register_optimizer("sgd")
def sgd(parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, fused: bool | None) -> torch.optim.Optimizer:
    """w <- w - learning_rate * (g + weight_decay * w), without a momentum: no memory beside the gradient."""
    return torch.optim.SGD(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


@register_optimizer("adafactor")
def adafactor(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, fused: bool | None
) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern, arXiv 1804.04235) with the learning rate of the config, as transformers' Trainer.

    The second moments of a matrix are kept as sums over its rows and columns: almost no memory beside the gradient.
    """
    return Adafactor(
        parameters,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


def check_bitsandbytes(config: Config) -> None:
    """Raise ConfigError if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optimizer.optim {config.optimizer.optim} needs bitsandbytes: pip install bitsandbytes, or set "
            f"optimizer.optim to {ADAMW}"
        )


def _register_bitsandbytes(name: str, bits: int, paged: bool) -> None:
    def create(
        parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, fused: bool | None
    ) -> torch.optim.Optimizer:
        import bitsandbytes

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            optim_bits=bits,
            is_paged=paged,
        )
        return optimizer

    OPTIMIZERS.add(name, create, check=check_bitsandbytes)


# AdamW of bitsandbytes (arXiv 2110.02861): moments in 8 bits; paged: in memory that CUDA moves to the CPU when short.
for _name, _bits, _paged in (
    ("adamw_bnb_8bit", 8, False),
    ("adamw_8bit", 8, False),
    ("paged_adamw_8bit", 8, True),
    ("paged_adamw_32bit", 32, True),
):
    _register_bitsandbytes(_name, _bits, _paged)


SCHEDULES: dict[str, Any] = {
    kind.value: function
    for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()
    if kind not in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # functions of a metric, not of the step
}
GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
"""Arguments of a schedule that the trainer gives."""


def check_schedule(config: Config) -> None:
    """Raise ConfigError if the schedule does not exist or cannot be computed with its settings."""
    optimizer, name = config.optimizer, config.optimizer.lr_scheduler_type
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f": did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"optimizer.lr_scheduler_type is '{name}', it must be one of {', '.join(SCHEDULES)}{hint}")
    own = {key: value for key, value in inspect.signature(SCHEDULES[name]).parameters.items() if key not in GIVEN}
    key = "optimizer.lr_scheduler_kwargs"
    for given in optimizer.lr_scheduler_kwargs:
        if given not in own:
            raise ConfigError(f"{key} has '{given}', which {name} does not take: it takes {', '.join(own) or 'none'}")
    for needed, parameter in own.items():
        if parameter.default is parameter.empty and needed not in optimizer.lr_scheduler_kwargs:
            raise ConfigError(
                f"optimizer.lr_scheduler_type {name} needs {key}.{needed}: set it, for example "
                f"--{key} '{{{needed}: {max(1, config.steps // 10)}}}'"
            )
    steps = config.optimizer_steps
    decay = optimizer.lr_scheduler_kwargs.get("num_decay_steps")
    if isinstance(decay, int) and decay > steps and config.num_train_epochs is None:
        raise ConfigError(f"{key}.num_decay_steps is {decay}, but there are {steps} optimizer steps: lower it")
    try:
        lowest, highest = _range_of_rates(optimizer, steps)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(
            f"optimizer.lr_scheduler_type {name} cannot be computed with {key} {optimizer.lr_scheduler_kwargs}: "
            f"{str(error).rstrip('.')}"
        ) from error
    if not (lowest >= 0 and highest < math.inf):
        raise ConfigError(
            f"optimizer.lr_scheduler_type {name} with {key} {optimizer.lr_scheduler_kwargs} gives learning rates from "
            f"{lowest:.3g} to {highest:.3g}: they must be finite and at least 0"
        )


def _range_of_rates(config: OptimizerConfig, steps: int) -> tuple[float, float]:
    """Return the lowest and the highest learning rate of a schedule, over at most 1,000 of its steps."""
    scheduler: Any = build_scheduler(torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate), config, steps)
    factors = [float(scheduler.lr_lambdas[0](step)) for step in range(0, steps, -(-steps // 1000))]
    rates = [config.learning_rate * factor for factor in factors]
    return (math.nan, math.nan) if any(map(math.isnan, rates)) else (min(rates), max(rates))


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimizerConfig, steps: int) -> LRScheduler:
    """Return the schedule `config.lr_scheduler_type` over `steps` optimizer steps, warm-up included."""
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=math.ceil(config.warmup_ratio * steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )


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
        if not isinstance(group.get("eps"), tuple):  # Adafactor has two, which are not the config's
            options["eps"] = config.adam_epsilon
        group.update({key: value for key, value in options.items() if key in group})
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
