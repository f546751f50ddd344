"""FSDP2 when memory runs out on one rank: ranks agree before each collective that all of them will take part.

Ranks gather weights and reduce gradients within a forward and backward pass. If one raises there, the others would wait
for it. So each collective is preceded by an exchange of flags between the CPUs, and all ranks raise at the same one.
"""

from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from grpo.runtime.distributed import Agreement, timeout_of


class _AllGather(DefaultAllGather):
    def __init__(self, agreement: Agreement) -> None:
        self.agreement = agreement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.agreement.proceed()  # all memory that the collective needs has been allocated
        return super().__call__(*args, **kwargs)


class _ReduceScatter(DefaultReduceScatter):
    def __init__(self, agreement: Agreement) -> None:
        self.agreement = agreement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.agreement.proceed()
        return super().__call__(*args, **kwargs)


def agree_before_collectives(module: nn.Module, accelerator: Accelerator) -> Agreement:
    """Let all ranks agree before each collective of `module`, a root of FSDP2. Collective."""
    agreement = Agreement(timeout_of(accelerator))
    for part in _parts(module):
        part.set_custom_all_gather(_AllGather(agreement))
        part.set_custom_reduce_scatter(_ReduceScatter(agreement))
    return agreement


def reset(module: nn.Module) -> None:
    """Drop whatever a forward or backward pass that raised has left behind: whole weights, gradients, states."""
    assert isinstance(module, FSDPModule)
    module.reset_iter_state()
    for part in _parts(module):
        for group in part._get_fsdp_state()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None


def _parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]
