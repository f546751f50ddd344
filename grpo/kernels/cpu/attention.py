"""Attention in C: one call for a row of sequences, some of which share a prompt.

Nothing is padded, repeated or concatenated, and only a few rows of scores exist at a time. For float32 on a CPU.
Shapes are those of grpo/kernels/attention.py: query [B, H, T, D], key and value [B, K, T, D].
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels.cpu import ops
from grpo.kernels.cpu.compiler import is_readable, library, threads_for
from grpo.kernels.registry import is_on


def is_supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether attention.c can read these tensors: all three float32, with a head size that is a multiple of 8.

    Under autocast, rotated queries and keys are float32 while values stay in 16 bits. Those are not supported.
    """
    size = query.shape[-1]
    same = size % 8 == 0 and key.shape[-1] == value.shape[-1] == size
    return same and is_readable(query, key, value, contiguous=False) and is_on("attention") and library() is not None


@dataclass(frozen=True)
class Sequences:
    """Sequences in one row of tokens, as attention.c reads them. The same for every layer."""

    rows: Tensor
    """[S, 5] int64: first token, number of tokens, number of tokens of its prompt, location of the prompt, and its
    index among the prompts outside the row, or -1."""
    groups: Tensor
    """[G + 1] int64: first sequence of each set of sequences that share a prompt."""
    first_tokens: list[int]
    """[G] first token of each group's first sequence."""
    longest: int
    """Maximum number of keys that a token attends to."""
    pairs: int
    """Approximate number of pairs of query and key."""
    elsewhere: list[int]
    """Lengths of the prompts outside the row."""

    @classmethod
    def of(cls, rows: list[list[int]], groups: list[int], elsewhere: list[int]) -> "Sequences":
        """Build from lists in the form of the attributes."""
        longest = max((row[1] + row[2] for row in rows), default=0)
        pairs = sum(row[1] * (row[1] + row[2]) for row in rows)
        tensors = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5), torch.tensor(groups)
        return cls(
            *tensors, [rows[group][0] if group < len(rows) else 0 for group in groups[:-1]], longest, pairs, elsewhere
        )


Join = tuple[int, Tensor, Tensor]
"""First token of a prompt in the row, and its keys and values [1, K, P, D]: leaves whose gradients are added."""


class PackedAttention(torch.autograd.Function):
    """Attention of rows: query [B, H, T, D], key and value [B, K, T, D] -> [B, H, T, D].

    `elsewhere` are the keys and values, in turn, of the prompts outside the row, [1, K, P, D] each.
    """

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
        # Token by token, as the surrounding layers store them: no copy for those.
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
    """Join the rows of a batch: [B, T, heads, D] -> [B * T, heads, D], for query, key and value."""
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
    """Compute attention of one row of tokens.

    Args:
        query: [T, H, D], contiguous float32.
        key: [T, K, D], likewise.
        value: [T, K, D], likewise.
        prompts: keys, values, keys, ... of the prompts outside the row, [1, P, K, D] each.
        sequences: the sequences in the row.
        scaling: factor of the scores.
        window: tokens that a query attends to, itself included. None: all before it.

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
    """Compute the gradients of `attend`.

    Args:
        query, key, value, prompts, sequences, scaling, window: as for `attend`.
        result: [T, H, D], the result of `attend`.
        lse: [H, T], the log-sum-exps of `attend`.
        gradient: [T, H, D], gradient of the result.
        joins: leaves whose gradients are added to those of keys and values.

    Returns:
        Gradients of query, key and value, and of the keys and values of the prompts outside the row, [1, K, P, D]
            each.
    """
    (tokens, heads, size), key_heads = query.shape, key.shape[1]
    threads, grad_query = threads_for(heads * sequences.pairs), torch.empty_like(query)
    # Gradients of keys and values are summed per key head, or per query head if that occupies more threads.
    parts = key_heads if (len(sequences.groups) - 1) * key_heads >= threads else heads
    # Zeros if there are prompts outside the row: one without completions gets no gradient.
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
    # Copies: a view would keep the memory of the whole row alive.
    outside = [share[None].transpose(1, 2).clone() for pair in others for share in pair]
    return grad_query, own[0], own[1], outside


def _workspace(size: int, sequences: Sequences, threads: int, *, layouts: int, scores: int) -> int:
    """Return the number of float32 elements of attention.c's workspace for heads of `size`."""
    wide, deep = (-(-number // ops.PANEL) * ops.PANEL for number in (sequences.longest, size))
    return threads * wide * (layouts * deep + scores * ops.ROWS)
