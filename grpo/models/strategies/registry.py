"""The strategies, and the choice of the one that the accelerate config asks for."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import InitProcessGroupKwargs

from grpo.errors import ConfigError
from grpo.models.strategies.base import Machine, Strategy
from grpo.models.strategies.deepspeed import Zero2, Zero3
from grpo.models.strategies.fsdp import FullyShardedDataParallel
from grpo.models.strategies.single import DistributedDataParallel, SingleProcess
from grpo.runtime.device import check_gpus, configure, set_threads
from grpo.runtime.env import drop_empty_variables
from grpo.runtime.launch import find_local_peers, requested_processes

STRATEGIES: list[type[Strategy]] = [Zero3, Zero2, FullyShardedDataParallel, SingleProcess, DistributedDataParallel]
"""In the order in which they are tried; the last one matches everything."""


def start_accelerator(timeout: float = 1800.0) -> Accelerator:
    """Create the Accelerator that `accelerate launch` and its config file ask for.

    Args:
        timeout: Seconds to wait for a rank in a collective before the run ends.

    Raises:
        ConfigError: Fewer processes started than were requested, or float16 was requested on a CPU.
    """
    drop_empty_variables()
    check_accelerate_settings()
    # Accelerate joins processes on a CPU only with `cpu`, and its launcher does not pass `use_cpu` on to several
    # processes. Without an accelerator there is no other choice.
    requested_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    on_cpu = requested_cpu or not torch.accelerator.is_available()
    if on_cpu and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise ConfigError(
            "mixed_precision is fp16, which accelerate computes on GPUs only, and this run is on the CPU: set it to "
            'bf16 or "no" in the file of --config_file, or with accelerate launch --mixed_precision'
        )
    if not on_cpu:
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        check_gpus(processes_here, os.environ.get("ACCELERATE_MIXED_PRECISION"))
    strategy = next(strategy for strategy in STRATEGIES if strategy.is_requested())
    process_group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    on_cpu = strategy.before_start(on_cpu, process_group)
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[process_group])
    requested = requested_processes()
    if accelerator.num_processes != requested:
        raise ConfigError(
            f"{requested} processes were asked for, {accelerator.num_processes} started. `accelerate launch --cpu` "
            f"starts only one, whatever --num_processes says: use --config_file accelerate_configs/cpu_2proc.yaml"
        )
    strategy.after_start(accelerator)
    configure(accelerator.device)
    set_threads(accelerator.device, accelerator.num_processes)
    find_local_peers(accelerator)
    return accelerator


def check_accelerate_settings() -> None:
    """Refuse settings of accelerate that would change the training and that this trainer does not follow.

    Raises:
        ConfigError: One of them is set.
    """
    for variable, (accepted, key, instead) in _UNSUPPORTED.items():
        value = os.environ.get(variable, "").strip()
        if value and value.lower() not in accepted:
            raise ConfigError(
                f"accelerate's {key} is {value} ({variable} in the environment), needs to be {accepted[0]}: {instead}. "
                f"Set it back in the file of --config_file, or in the flags of accelerate launch"
            )


_OFF = ("false", "0", "no", "off", "n", "f")
_UNSUPPORTED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        ("1", "auto"),
        "gradient_accumulation_steps",
        "gradients would be divided by it. A step is split by tokens_per_batch, which leaves the gradient as it is",
    ),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "dynamo_backend", "packed batches are not compiled"),
    "ACCELERATE_MIXED_PRECISION": (("no", "bf16", "fp16"), "mixed_precision", "there is no other precision here"),
    "ACCELERATE_USE_MEGATRON_LM": (_OFF, "use_megatron_lm", "use one of accelerate_configs/"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (_OFF, "use_parallelism_config", "use one of accelerate_configs/"),
    "ACCELERATE_USE_SAGEMAKER": (_OFF, "use_sagemaker", "use one of accelerate_configs/"),
}
"""Variable of the launcher -> (accepted values, the key's name, what to use instead)."""


def strategy_for(accelerator: Accelerator) -> Strategy:
    """Return a new strategy object, of the class that `accelerator` was set up for."""
    return next(strategy for strategy in STRATEGIES if strategy.matches(accelerator))(accelerator)


def strategy_class(machine: Machine) -> type[Strategy]:
    """Return the strategy class of a memory estimate."""
    return next(strategy for strategy in STRATEGIES if strategy.kind == machine.kind)


def machine_of(path: str) -> Machine:
    """Read from an accelerate config file what memory depends on.

    Raises:
        ConfigError: The file cannot be read.
    """
    try:
        config = load_config_from_file(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the accelerate config {path}: {error}") from error
    machines = (strategy.machine_of(config) for strategy in STRATEGIES)
    return next(machine for machine in machines if machine is not None)
