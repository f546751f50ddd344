"""Recurrent layers of hybrid models (gated DeltaNet, Mamba, short convolutions) on packed rows and on slots.

`use_grpo_mixers` gives each of these layers a forward function that follows the keyword argument `layout`, as attention
does (grpo/kernels/attention.py). Without a layout, transformers' own forward pass runs. A layer is its own projections
around a convolution and a recurrence (grpo/kernels/recurrent.py):

    hidden -> project -> channels -> convolution -> SiLU -> inputs -> recurrence -> finish -> hidden

T    tokens of a packed row, or rows of a decoding step
E    channels of the convolution
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.kernels.attention import PackedLayout, SlotLayout, joined
from grpo.kernels.recurrent import Advance, GroupScan, delta_rule, delta_rule_step, join, selective_scan

Context = tuple[Tensor, ...]


@dataclass(frozen=True)
class Kind:
    """Parts of a recurrent layer. The first argument of each function is the module."""

    project: Callable[[Any, Tensor], tuple[Tensor, Context]]
    """Hidden states [1, T, H] -> channels [T, E] and what the later parts need."""
    finish: Callable[[Any, Tensor, Tensor, Context], Tensor]
    """Outputs of the recurrence [T, ...] (of the convolution, if there is none), outputs of the convolution [T, E] and
    the context -> hidden states [T, H].
    """
    inputs: Callable[[Any, Tensor, Context], Tensor] | None = None
    """Outputs of the convolution [T, E] -> inputs of the recurrence [T, features], float32. None: no recurrence."""
    advance: Callable[[Any], Advance] | None = None
    """Return the function that computes a chunk."""
    step: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    """Inputs [T, features] of one token per row and the state, which changes in place -> outputs [T, ...]."""
    convolution: str = "conv1d"
    """Name of the convolution."""
    activates: bool = True
    """SiLU follows the convolution."""


def use_grpo_mixers(model: nn.Module) -> bool:
    """Let the recurrent layers of `model` follow a layout.

    Returns:
        True if the model has such layers.
    """
    found = [module for module in model.modules() if _is_supported(module)]
    for module in found:
        module.forward = MethodType(_forward, module)
    return bool(found)


def _is_supported(module: nn.Module) -> bool:
    known = type(module).__name__ in KINDS and type(module).__module__.startswith("transformers.models.")
    return known and getattr(module, "activation", "silu") in ("silu", "swish")


def has_mixers(model: nn.Module) -> bool:
    """Return whether `model` has recurrent layers that follow a layout."""
    return any(type(module).__name__ in KINDS and "forward" in vars(module) for module in model.modules())


def layout_arguments(model: PreTrainedModel, layout: PackedLayout | SlotLayout) -> dict[str, Any]:
    """Return the keyword arguments of the base model that carry `layout` to its layers."""
    arguments: dict[str, Any] = {"layout": layout}
    if model.config.model_type == "jamba":  # its layers pass on no keyword arguments, only the mask
        arguments["attention_mask"] = {"full_attention": None, "linear_attention": layout}
    return arguments


def _forward(self: Any, hidden_states: Tensor, *args: Any, layout: Any = None, **kwargs: Any) -> Tensor:
    mask = kwargs.get("attention_mask")
    layout = mask if isinstance(mask, PackedLayout | SlotLayout) else layout
    if layout is None:
        return cast(Tensor, type(self).forward(self, hidden_states, *args, **kwargs))
    kind = KINDS[type(self).__name__]
    mixed = _step if isinstance(layout, SlotLayout) else _packed
    rows, tokens, size = hidden_states.shape
    channels_TE, context = kind.project(self, hidden_states.reshape(1, rows * tokens, size))
    with torch.autocast(hidden_states.device.type, enabled=False):
        output, convolved = mixed(self, kind, channels_TE.float(), context, layout)
    return kind.finish(self, output, convolved, context).to(hidden_states.dtype).view(rows, tokens, size)


def _packed(
    mixer: Any, kind: Kind, channels_TE: Tensor, context: Context, layout: PackedLayout
) -> tuple[Tensor, Tensor]:
    """Return the outputs of the recurrence and of the convolution for one packed row."""
    weight_EW, bias = _convolution(mixer, kind)
    window = weight_EW.shape[1]
    scan = cast(GroupScan, layout.scans.get(window) or GroupScan(layout, window))
    layout.scans[window] = scan
    kept = {index: next(layout.elsewhere[index]) for index in sorted(layout.elsewhere)}
    ends = dict(zip(scan.here, scan.prompt_ends(channels_TE), strict=True))
    ends |= {index: pair[0] for index, pair in kept.items()}
    convolved = scan.convolve(channels_TE, weight_EW, bias, [ends[index] for index in range(len(layout.spans))])
    if kind.activates:
        convolved = F.silu(convolved)
    if kind.inputs is None or kind.advance is None:
        outputs, inputs = list[Tensor](), None
        states = {index: convolved.new_zeros(1, 0) for index in scan.here}
    else:
        inputs, advance = kind.inputs(mixer, convolved, context), kind.advance(mixer)
        outputs, found = scan.prompts(inputs, advance)
        states = dict(zip(scan.here, found, strict=True))
    for index, watcher in layout.watched.items():
        before = watcher(ends[index], states[index])
        if before is not None:
            joined(ends[index], before[0])
            joined(states[index], before[1])
    if layout.states is not None:
        own = [torch.cat([part[index] for index in scan.here]) for part in (ends, states)]
        layout.states.collect(mixer.layer_idx, own[0], own[1])
    if inputs is None:
        return convolved, convolved
    states |= {index: pair[1] for index, pair in kept.items()}
    outputs += scan.completions(inputs, [states[index] for index in range(len(layout.spans))], advance)
    return scan.gather(outputs), convolved


def _step(mixer: Any, kind: Kind, channels_TE: Tensor, context: Context, layout: SlotLayout) -> tuple[Tensor, Tensor]:
    """Same for one new token of each row in its slot. Changes the states in the slots."""
    assert layout.states is not None, "the slots of a hybrid model have states"
    before, state = layout.states.of(mixer.layer_idx)
    weight_EW, bias = _convolution(mixer, kind)
    seen = torch.cat([before, channels_TE[:, None]], dim=1)
    before.copy_(seen[:, 1:])
    convolved = torch.einsum("twe,ew->te", seen, weight_EW)
    if bias is not None:
        convolved = convolved + bias
    if kind.activates:
        convolved = F.silu(convolved)
    if kind.inputs is None or kind.step is None:
        return convolved, convolved
    return kind.step(mixer, kind.inputs(mixer, convolved, context), state), convolved


def _convolution(mixer: Any, kind: Kind) -> tuple[Tensor, Tensor | None]:
    module = getattr(mixer, kind.convolution)
    return module.weight.squeeze(1).float(), None if module.bias is None else module.bias.float()


# Gated DeltaNet


def _project_delta_net(mixer: Any, hidden: Tensor) -> tuple[Tensor, Context]:
    context = (mixer.in_proj_z(hidden)[0], mixer.in_proj_b(hidden)[0], mixer.in_proj_a(hidden)[0])
    return mixer.in_proj_qkv(hidden)[0], context


def _project_qwen3_next(mixer: Any, hidden: Tensor) -> tuple[Tensor, Context]:
    parts = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(hidden), mixer.in_proj_ba(hidden))
    query, key, value, z, b, a = (part[0].flatten(1) for part in parts)
    return torch.cat([query, key, value], dim=1), (z, b, a)


def _project_olmo(mixer: Any, hidden: Tensor) -> tuple[Tensor, Context]:
    channels = torch.cat([mixer.q_proj(hidden), mixer.k_proj(hidden), mixer.v_proj(hidden)], dim=-1)
    return channels[0], (mixer.g_proj(hidden)[0], mixer.b_proj(hidden)[0], mixer.a_proj(hidden)[0])


def _delta_net_inputs(mixer: Any, convolved_TE: Tensor, context: Context) -> Tensor:
    _, rate, step = context
    sizes = [mixer.key_dim, mixer.key_dim, mixer.value_dim]
    query, key, value = convolved_TE.split(sizes, dim=1)
    query, key = (_unit_length(part.unflatten(1, (-1, mixer.head_k_dim))) for part in (query, key))
    log_decay = -mixer.A_log.float().exp() * F.softplus(step.float() + mixer.dt_bias.float())
    rate = rate.float().sigmoid() * (2.0 if getattr(mixer, "allow_neg_eigval", False) else 1.0)
    return join(query * mixer.head_k_dim**-0.5, key, value, log_decay, rate)


def _unit_length(vectors: Tensor) -> Tensor:
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + 1e-6)


def _delta_net_shape(mixer: Any) -> dict[str, Any]:
    keys = mixer.num_k_heads
    return {"keys": keys, "shared": mixer.num_v_heads // keys, "size": mixer.head_k_dim, "beta": True}


def _finish_delta_net(mixer: Any, output: Tensor, convolved_TE: Tensor, context: Context) -> Tensor:
    gate = context[0]
    heads = output.to(gate.dtype).view(-1, mixer.head_v_dim)
    return cast(Tensor, mixer.out_proj(mixer.norm(heads, gate.reshape(heads.shape)).view(len(gate), -1)))


def _finish_olmo(mixer: Any, output: Tensor, convolved_TE: Tensor, context: Context) -> Tensor:
    gate = context[0]
    heads = output.to(gate.dtype).view(-1, mixer.head_v_dim)
    return cast(Tensor, mixer.o_proj(mixer.o_norm(heads, gate.reshape(heads.shape)).view(len(gate), -1)))


# Mamba-2


def _project_mamba2(mixer: Any, hidden: Tensor) -> tuple[Tensor, Context]:
    projected = mixer.in_proj(hidden * getattr(mixer, "ssm_in_multiplier", 1.0))
    projected = (projected * getattr(mixer, "mup_vector", 1.0))[0]
    gate, channels, step = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=1)
    return channels, (gate, step)


def _mamba2_inputs(mixer: Any, convolved_TE: Tensor, context: Context) -> Tensor:
    groups = mixer.n_groups * mixer.ssm_state_size
    value, key, query = convolved_TE.split([mixer.intermediate_size, groups, groups], dim=1)
    step = F.softplus(context[1].float() + mixer.dt_bias.float()).clamp(*mixer.time_step_limit)
    value = value.unflatten(1, (mixer.num_heads, -1)) * step[..., None]
    return join(query, key, value, -mixer.A_log.float().exp() * step)


def _mamba2_shape(mixer: Any) -> dict[str, Any]:
    groups = mixer.n_groups
    return {"keys": groups, "shared": mixer.num_heads // groups, "size": mixer.ssm_state_size, "beta": False}


def _finish_mamba2(mixer: Any, output: Tensor, convolved_TE: Tensor, context: Context) -> Tensor:
    gate = context[0]
    value = convolved_TE[:, : mixer.intermediate_size].unflatten(1, (mixer.num_heads, -1))
    output = output + (value * mixer.D.float()[:, None]).flatten(1)
    has_norm = getattr(mixer, "mamba_rms_norm", True)
    output = mixer.norm(output, gate) if has_norm else output * F.silu(gate)
    return cast(Tensor, mixer.out_proj(output.to(gate.dtype)))


# Mamba, with Jamba's norms


def _project_mamba(mixer: Any, hidden: Tensor) -> tuple[Tensor, Context]:
    channels, gate = mixer.in_proj(hidden)[0].chunk(2, dim=1)
    return channels, (gate,)


def _mamba_inputs(mixer: Any, convolved_TE: Tensor, context: Context) -> Tensor:
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    step, read_in, read_out = mixer.x_proj(convolved_TE.to(mixer.x_proj.weight.dtype)).split(sizes, dim=1)
    step = F.softplus(mixer.dt_proj(mixer.dt_layernorm(step)).float())
    parts = [convolved_TE, step, mixer.b_layernorm(read_in).float(), mixer.c_layernorm(read_out).float()]
    return torch.cat(parts, dim=1)


def _mamba_advance(mixer: Any) -> Advance:
    return partial(selective_scan, log_rates_EN=-mixer.A_log.float().exp())


def _mamba_step(mixer: Any, inputs: Tensor, state: Tensor) -> Tensor:
    output, new = _mamba_advance(mixer)(inputs[:, None], state)
    state.copy_(new)
    return output[:, 0]


def _finish_mamba(mixer: Any, output: Tensor, convolved_TE: Tensor, context: Context) -> Tensor:
    gate = context[0]
    output = (output + convolved_TE * mixer.D.float()) * F.silu(gate)
    return cast(Tensor, mixer.out_proj(output.to(gate.dtype)))


# Short convolutions


def _project_short(mixer: Any, hidden: Tensor) -> tuple[Tensor, Context]:
    before, after, channels = mixer.in_proj(hidden)[0].chunk(3, dim=1)
    return before * channels, (after,)


def _finish_short(mixer: Any, output: Tensor, convolved_TE: Tensor, context: Context) -> Tensor:
    return cast(Tensor, mixer.out_proj(context[0] * output.to(context[0].dtype)))


def _matrix_kind(shape: Callable[[Any], dict[str, Any]], **parts: Any) -> Kind:
    return Kind(
        advance=lambda mixer: partial(delta_rule, **shape(mixer)),
        step=lambda mixer, inputs, state: delta_rule_step(inputs, state, **shape(mixer)),
        **parts,
    )


DELTA_NET = _matrix_kind(
    _delta_net_shape, project=_project_delta_net, inputs=_delta_net_inputs, finish=_finish_delta_net
)
MAMBA2 = _matrix_kind(_mamba2_shape, project=_project_mamba2, inputs=_mamba2_inputs, finish=_finish_mamba2)
MAMBA = Kind(_project_mamba, _finish_mamba, _mamba_inputs, _mamba_advance, _mamba_step)
SHORT = Kind(_project_short, _finish_short, convolution="conv", activates=False)
KINDS = {
    "BambaMixer": MAMBA2,
    "FalconH1Mixer": MAMBA2,
    "GraniteMoeHybridMambaLayer": MAMBA2,
    "JambaMambaMixer": MAMBA,
    "Lfm2MoeShortConv": SHORT,
    "Lfm2ShortConv": SHORT,
    "Lfm3ShortConv": SHORT,
    "Mamba2Mixer": MAMBA2,
    "NemotronHMamba2Mixer": MAMBA2,
    "OlmoHybridGatedDeltaNet": replace(DELTA_NET, project=_project_olmo, finish=_finish_olmo),
    "Qwen3NextGatedDeltaNet": replace(DELTA_NET, project=_project_qwen3_next),
    "Qwen3_5GatedDeltaNet": DELTA_NET,
    "Qwen3_5MoeGatedDeltaNet": DELTA_NET,
}
"""Class of a recurrent layer in transformers -> its parts."""
