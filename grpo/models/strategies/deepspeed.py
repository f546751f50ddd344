"""ZeRO: the only file that knows DeepSpeed. Its engine owns backward, clipping, the step and the float32 weights.

    ZeRO-2     every rank holds the weights in the compute dtype, and a part of the gradients, masters and moments
    ZeRO-3     the weights are in parts as well

(Rajbhandari et al., arXiv 1910.02054.) Names in a checkpoint are the plain model's, as everywhere: what ran under DeepSpeed
can be resumed without it.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from grpo.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by the optimizer's own names."""


def in_use(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def stage(accelerator: Accelerator) -> int:
    """0 without DeepSpeed."""
    return int(accelerator.state.deepspeed_plugin.zero_stage) if in_use(accelerator) else 0


def configure(accelerator: Accelerator, max_grad_norm: float) -> None:
    """Before any model is made: what DeepSpeed wants to know of a data loader that we do not have, our clipping, and that
    models are made whole. Left to itself, transformers would make every one of them in parts under ZeRO-3: the plain copies,
    the reference and the probes as well. `prepare` takes apart the one that learns. Raises ConfigError for an optimizer offloaded
    to the CPU."""
    unset_hf_deepspeed_config()
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    place = settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if place != "none":
        raise ConfigError(
            f"offload_optimizer_device is {place}: DeepSpeed would then put an optimizer of its own in the place of ours, which "
            f"the learning rate's schedule and the checkpoints would not reach. Set it to none, and lora.r or more GPUs where "
            f"memory is short"
        )
    settings["train_micro_batch_size_per_gpu"] = 1  # only used to print throughput
    settings["gradient_clipping"] = max_grad_norm
    settings["steps_per_print"] = 10**9


def announce(logprob_model: nn.Module, head: nn.Module) -> None:
    """After `prepare`: the logprob_model reads the weight of the head and never calls it, so ZeRO-3 must gather it for the logprob_model."""
    if hasattr(next(head.parameters()), "ds_id"):
        import deepspeed

        for parameter in head.parameters():
            deepspeed.zero.register_external_parameter(logprob_model, parameter)


def backward(engine: Any, loss: Tensor, *, last: bool) -> None:
    """Add up the gradient of `loss`; at the `last` batch of a step, ranks have exchanged it."""
    if not math.isfinite(float(loss.detach())):
        loss = loss * math.nan  # seen by every rank, so that all of them skip the step
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss)


def step(engine: Any) -> float:
    """Clip, step, clear. -> the gradient norm before clipping; inf if it was not finite and nothing was changed."""
    engine.optimizer.check_grad_overflow = True  # in float32 too, where DeepSpeed would not look
    engine.step()
    norm = engine.get_global_grad_norm()
    return math.inf if engine.optimizer.overflow else float(norm or 0.0)


def master(parameter: nn.Parameter) -> Tensor | None:
    """The float32 weight behind a trained parameter, whole; None if DeepSpeed does not train it. Collective."""
    if not parameter.requires_grad or not (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    found = safe_get_full_fp32_param(parameter)
    return None if found is None else found.detach()


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within, parameters that ZeRO-3 has sharded are whole. Collective there."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(trained weights in float32, optimizer state by weight name), on the CPU of every rank. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    weights: dict[str, Tensor] = {}
    state: dict[str, dict[str, Tensor]] = {}
    steps = [moments["step"] for moments in optimizer.state.values() if "step" in moments]
    for name, parameter in trained(model):
        weights[name] = _on_cpu(master(parameter))
        if steps:
            state[name] = {key: _on_cpu(safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS}
            state[name]["step"] = _on_cpu(steps[0])
    [group] = optimizer.param_groups
    settings = {key: value for key, value in group.items() if key != "params"}
    return weights, {"state": state, "param_groups": [settings | {"params": list(weights)}]}


def load_full_state(
    model: nn.Module, engine: Any, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], moments: dict[str, Any]
) -> None:
    """What full_state gave, or a run without DeepSpeed saved (its optimizer state is by number), on every rank."""
    import deepspeed

    saved = moments["state"]
    order = moments["param_groups"][0]["params"]
    by_name = {name: saved.get(key) for (name, _), key in zip(trained(model), order, strict=True)}
    if saved:
        _make_moments(engine, optimizer, next(iter(saved.values()))["step"])
    for name, parameter in trained(model):
        value = weights[name].to(parameter.device)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)
        _set_master(parameter, value.float())
        for key in MOMENTS if by_name[name] else ():
            _set_master(parameter, by_name[name][key].to(parameter.device), key)
    for group, settings in zip(optimizer.param_groups, moments["param_groups"], strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _make_moments(engine: Any, optimizer: torch.optim.Optimizer, step: Tensor) -> None:
    """AdamW makes its moments at its first step; a resumed run needs them before."""
    parts = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # of ZeRO-3
    for part in engine.optimizer.single_partition_of_fp32_groups if parts is None else parts:
        optimizer.state[part] = {"step": step.clone(), **{key: torch.zeros_like(part) for key in MOMENTS}}
    if parts is None:
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set_master(parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
    """Write this rank's part of the float32 weight, or of the moment `key`."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, key)
        return
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # every rank's is the same: the last one is padded
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
