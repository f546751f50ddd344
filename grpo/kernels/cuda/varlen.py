"""Packed attention in one call of `torch.nn.attention.varlen`, for 16-bit dtypes on CUDA.

The queries are the row as it is. The keys of a prompt are its own; those of a completion are its prompt's and its own,
copied side by side. Attention is causal, aligned at the last token of each sequence.

    # prompt [0 1 2], completions [3 4] and [5]      queries of a sequence     its keys
    #                                                0 1 2                     0 1 2
    #                                                3 4                       0 1 2 3 4
    #                                                5                         0 1 2 5
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from grpo.kernels.cpu.attention import Join, Sequences
from grpo.kernels.registry import is_on
from grpo.kernels.transfer import to_device

MAX_HEAD_SIZE = 256
MIN_CAPABILITY = (8, 0)
SHARED_KEYS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""Argument for queries with more heads than keys. The kernel of torch 2.11 takes them without it."""


def is_available(device: torch.device) -> bool:
    """Return whether the kernel may be used on `device`."""
    return device.type == "cuda" and is_on("varlen_attention") and missing(device) is None


def missing(device: torch.device) -> str | None:
    """Return what the CUDA device lacks for the kernel, or None."""
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "it needs compute capability {}.{}, and this GPU has {}.{}".format(*MIN_CAPABILITY, *capability)
    return None


def is_supported(query: Tensor, value: Tensor) -> bool:
    """Return whether the kernel can compute these heads: 16 bits, and one head size that is a multiple of 8."""
    size = query.shape[-1]
    return (
        compute_dtype(query) in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= MAX_HEAD_SIZE
    )


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that attention computes in: that of autocast, or that of `tensor` if autocast is off."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


@dataclass(frozen=True)
class VarlenPlan:
    """Indices of one packed row, on its device. The same for every layer.

    Letters: S sequences, E tokens of the row and of the prompts outside it, R keys of all sequences.
    """

    keys_R: Tensor
    """[R] token of each key."""
    query_starts: Tensor
    """[S + 1] int32: first query of each sequence."""
    key_starts: Tensor
    """[S + 1] int32: first key of each sequence."""
    longest: int
    longest_keys: int
    first_E: Tensor
    """[E] index of the first key that is a copy of each token."""
    shared_M: Tensor
    """[M] the tokens with more than one copy, or none: those of prompts."""
    copies_MW: Tensor
    """[M, W] indices of their copies, filled up with any index."""
    is_copy_MW: Tensor | None
    """[M, W, 1, 1] whether an index of `copies_MW` is a copy. None if all are."""

    @classmethod
    def of(cls, sequences: Sequences, tokens: int, device: torch.device) -> "VarlenPlan":
        """Build from `sequences`, whose row has `tokens` tokens."""
        first, length, prompt, place, _ = sequences.rows.T
        starts, counts = torch.stack([place, first], 1).flatten(), torch.stack([prompt, length], 1).flatten()
        before = counts.cumsum(0) - counts
        keys_R = torch.arange(int(counts.sum())) + (starts - before).repeat_interleave(counts)
        total = tokens + sum(sequences.elsewhere)
        copies_E, order_R = keys_R.bincount(minlength=total), keys_R.argsort(stable=True)
        begin_E = copies_E.cumsum(0) - copies_E
        shared_M = (copies_E != 1).nonzero().squeeze(1)
        column = torch.arange(int(copies_E.max()) if len(copies_E) else 0)
        index_MW = (begin_E[shared_M, None] + column).clamp(max=len(order_R) - 1)
        is_copy = column < copies_E[shared_M, None]
        index = [
            keys_R,
            F.pad(length.cumsum(0), (1, 0)).int(),
            F.pad((length + prompt).cumsum(0), (1, 0)).int(),
            order_R[begin_E.clamp(max=len(order_R) - 1)],
            shared_M,
            order_R[index_MW],
        ]
        keys_R, query_starts, key_starts, first_E, shared_M, copies_MW = (to_device(part, device) for part in index)
        mask = None if bool(is_copy.all()) else to_device(is_copy[:, :, None, None], device)
        longest = int(length.max())
        return cls(keys_R, query_starts, key_starts, longest, sequences.longest, first_E, shared_M, copies_MW, mask)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: VarlenPlan,
    scaling: float | None,
    window: int | None,
    joins: list[Join],
    outside: list[Tensor],
) -> Tensor:
    """Attention of one packed row: query [1, H, T, D], key and value [1, K, T, D] -> [1, H, T, D].

    Args:
        query: queries.
        key: keys of the row.
        value: values of the row.
        plan: indices of the row.
        scaling: factor of the scores. None: 1 / sqrt(D).
        window: tokens that a query attends to, itself included. None: all before it.
        joins: leaves whose gradients are added to those of keys and values.
        outside: keys and values, in turn, of the prompts outside the row, [1, K, P, D] each.
    """
    dtype = compute_dtype(query)
    keys, values = (
        GatherKeys.apply(torch.cat([own, *others], dim=2) if others else own, plan, dtype, leaves)
        for own, others, leaves in (
            (key, outside[0::2], [(first, before) for first, before, _ in joins]),
            (value, outside[1::2], [(first, before) for first, _, before in joins]),
        )
    )
    attended = varlen_attn(
        query[0].transpose(0, 1).to(dtype).contiguous(),
        keys,
        values,
        plan.query_starts,
        plan.key_starts,
        plan.longest,
        plan.longest_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **(SHARED_KEYS if query.shape[1] != key.shape[1] else {}),
    )
    assert isinstance(attended, Tensor)
    return attended.transpose(0, 1)[None]


class GatherKeys(torch.autograd.Function):
    """Keys or values of all sequences: [1, K, E, D] -> [R, K, D] in the dtype of the kernel.

    The backward pass reads the gradient of each copy once, and sums those of one token in a fixed order. That of
    index_select would add them one by one, atomically and in 16 bits.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, tensor: Tensor, plan: VarlenPlan, dtype: torch.dtype, joins: list[tuple[int, Tensor]]
    ) -> Tensor:
        ctx.plan, ctx.joins, ctx.dtype = plan, joins, tensor.dtype
        return tensor[0].transpose(0, 1).to(dtype).index_select(0, plan.keys_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        plan = ctx.plan
        grad_E = gradient.index_select(0, plan.first_E)
        shares = gradient.index_select(0, plan.copies_MW.flatten()).unflatten(0, plan.copies_MW.shape)
        if plan.is_copy_MW is not None:
            shares = shares.masked_fill(~plan.is_copy_MW, 0.0)
        grad_E.index_copy_(0, plan.shared_M, shares.sum(1).to(grad_E.dtype))  # under autocast, sums are float32
        grad_E = grad_E.to(ctx.dtype)
        for first, leaf in ctx.joins:
            if leaf.grad is not None:
                grad_E[first : first + leaf.shape[2]] += leaf.grad[0].transpose(0, 1)
        return grad_E.transpose(0, 1)[None], None, None, None
