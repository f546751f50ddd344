"""Attention in C: one call for a row of sequences, some of which share a prompt.

Nothing is padded, repeated or concatenated, and only a few rows of scores exist at a time. For float32 on a CPU. Shapes are
those of grpo/kernels/attention.py: query [B, H, T, D], key and value [B, K, T, D].
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels.cpu import ops
from grpo.kernels.cpu.compiler import is_readable, library, threads_for
from grpo.kernels.registry import is_on


def is_supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether attention.c takes them. Under autocast the rotation gives float32, and a value keeps its 16 bits."""
    size = query.shape[-1]
    same = size % 8 == 0 and key.shape[-1] == value.shape[-1] == size
    return same and is_readable(query, key, value, contiguous=False) and is_on("attention") and library() is not None


@dataclass(frozen=True)
class Sequences:
    """The sequences in one row of tokens, as attention.c reads them: the same for every layer."""

    rows: Tensor
    """[S, 5] int64: first token, tokens, tokens of its prompt before them, where the prompt lies, and its index among the
    prompts elsewhere or -1"""
    groups: Tensor
    """[G + 1] int64: first sequence of each set of sequences that share a prompt"""
    first_tokens: list[int]
    """[G] the first token of each group's first sequence"""
    longest: int
    """Most keys that a token sees."""
    pairs: int
    """Pairs of queries and keys, about."""
    elsewhere: list[int]
    """Lengths of the prompts that are not in the row."""

    @classmethod
    def of(cls, rows: list[list[int]], groups: list[int], elsewhere: list[int]) -> "Sequences":
        longest = max((row[1] + row[2] for row in rows), default=0)
        pairs = sum(row[1] * (row[1] + row[2]) for row in rows)
        tensors = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5), torch.tensor(groups)
        return cls(
            *tensors, [rows[group][0] if group < len(rows) else 0 for group in groups[:-1]], longest, pairs, elsewhere
        )


Join = tuple[int, Tensor, Tensor]
"""The first token, and keys and values [1, K, P, D], of a prompt in the row, in leaves whose gradients are to be added."""


class PackedAttention(torch.autograd.Function):
    """query [B, H, T, D], key and value [B, K, T, D], and keys and values of prompts elsewhere, [1, K, P, D] each -> [B, H, T, D]"""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: Sequences,
        scaling: float | None,
        window: int | None,
        joins: list[Join],
        *elsewhere: Tensor,
    ) -> Tensor:
        # Token by token, as the layers around have them: for those, no copy.
        query, key, value, *prompts = (
            tensor.transpose(1, 2).contiguous() for tensor in (query, key, value, *elsewhere)
        )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        result, lse = attend(*_rows(query, key, value), prompts, sequences, scaling, window)
        ctx.save_for_backward(query, key, value, result, lse, *prompts)
        ctx.sequences, ctx.scaling, ctx.window, ctx.joins = sequences, scaling, window, joins
        return result.view(query.shape).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        query, key, value, result, lse, *prompts = ctx.saved_tensors
        gradient = gradient.transpose(1, 2).contiguous().flatten(0, 1)
        plan = (prompts, ctx.sequences, ctx.scaling, ctx.window)
        grads = attend_backward(*_rows(query, key, value), *plan, result, lse, gradient, ctx.joins)
        grad_query, grad_key, grad_value = (
            grad.view(like.shape).transpose(1, 2) for grad, like in zip(grads[:3], (query, key, value), strict=True)
        )
        return grad_query, grad_key, grad_value, None, None, None, None, *grads[3]


def _rows(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, heads, D] -> [B * T, heads, D]"""
    return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompts: list[Tensor],
    sequences: Sequences,
    scaling: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Attention of one row of tokens.

    Args:
        query: [T, H, D]; key and value [T, K, D]; contiguous float32.
        prompts: keys, values, keys, ... of the prompts elsewhere, [1, P, K, D] each.

    Returns:
        The result [T, H, D], and the log-sum-exp of the scores [H, T].
    """
    tokens, heads, size = query.shape
    threads = threads_for(heads * sequences.pairs)
    result, lse = torch.empty_like(query), query.new_empty(heads, tokens)
    workspace = query.new_empty(_workspace(size, sequences, threads, layouts=2, scores=1))
    plan = (prompts[::2], prompts[1::2], sequences.rows, sequences.longest, threads, window or 0, scaling)
    ops.attention(query, key, value, *plan, workspace, result, lse)
    return result, lse


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompts: list[Tensor],
    sequences: Sequences,
    scaling: float,
    window: int | None,
    result: Tensor,
    lse: Tensor,
    gradient: Tensor,
    joins: list[Join],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of `attend`: of query, key and value, with the share that `joins` add, and of the prompts elsewhere [1, K, P, D]."""
    (tokens, heads, size), key_heads = query.shape, key.shape[1]
    threads, grad_query = threads_for(heads * sequences.pairs), torch.empty_like(query)
    # Gradients of keys and values are added up for each key head, or for each head, where that keeps more threads busy.
    parts = key_heads if (len(sequences.groups) - 1) * key_heads >= threads else heads
    # Zeros where there are prompts elsewhere: one without completions gets nothing.
    make = query.new_zeros if sequences.elsewhere else query.new_empty
    shares = make(2, tokens + sum(sequences.elsewhere), parts, size)
    workspace = query.new_empty(_workspace(size, sequences, threads, layouts=3, scores=2))
    plan = (prompts[::2], prompts[1::2], sequences.rows, sequences.groups, sequences.longest, threads, window or 0)
    tensors = (result, lse, gradient, workspace, grad_query, *shares.unbind())
    ops.attention_backward(query, key, value, *plan, scaling, *tensors)
    if parts != key_heads:
        shares = shares.unflatten(2, (key_heads, -1)).sum(3)
    for first, *leaves in joins:
        for share, leaf in zip(shares, leaves, strict=True):
            if leaf.grad is not None:
                share[first : first + leaf.shape[2]] += leaf.grad[0].transpose(0, 1)
    own, *others = shares.split([tokens, *sequences.elsewhere], dim=1)
    # A copy: a leaf would keep the whole of what it is a part of.
    outside = [share[None].transpose(1, 2).clone() for pair in others for share in pair]
    return grad_query, own[0], own[1], outside


def _workspace(size: int, sequences: Sequences, threads: int, *, layouts: int, scores: int) -> int:
    """Numbers in the workspace of attention.c for heads of `size`."""
    wide, deep = (-(-number // ops.PANEL) * ops.PANEL for number in (sequences.longest, size))
    return threads * wide * (layouts * deep + scores * ops.ROWS)
