"""Attention by attention.c: a row of sequences, some of which share a prompt -> what every token sees, in one call.

For float32 on a CPU. Shapes are those of attention.py: query [B, H, T, D], key and value [B, K, T, D].
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable

from grpo.compiled import attention_library, plain, pointer, threads_for

PANEL, ROWS = 16, 12
"""As in lanes.h (ROWS at most): how much room attention.c wants."""


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether attention.c can take them. Under autocast RoPE gives float32, and a value keeps its 16 bits."""
    size = query.shape[-1]
    fits = size % 8 == 0 and key.shape[-1] == value.shape[-1] == size
    return fits and plain(query, key, value, contiguous=False) and attention_library() is not None


@dataclass(frozen=True)
class Sequences:
    """What attention.c is told of a row of tokens: the same for every layer."""

    rows: Tensor
    """[S, 5] int64: the first token of each, how many, how many its prompt has before them, where that lies, and which of those
    elsewhere it is, or -1"""
    groups: Tensor
    """[G + 1] int64: where the sequences begin that share a prompt"""
    longest: int
    """keys that a token may look at"""
    pairs: int
    """of queries and keys, about"""
    elsewhere: list[int]
    """Lengths of the prompts that are not in the row."""

    @classmethod
    def of(cls, rows: list[list[int]], groups: list[int], elsewhere: list[int]) -> "Sequences":
        with unset_fake_temporarily():  # where only memory is counted
            tensors = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5), torch.tensor(groups)
        longest = max((row[1] + row[2] for row in rows), default=0)
        return cls(*tensors, longest, sum(row[1] * (row[1] + row[2]) for row in rows), elsewhere)

    def prompt_of(self, group: int) -> int:
        return int(self.rows[self.groups[group], 0])


Join = tuple[int, Tensor, Tensor]
"""The first token, and keys and values [1, K, P, D], of a prompt in the row, in leaves whose gradients are to be added."""


class CompiledAttention(torch.autograd.Function):
    """query [B, H, T, D], key and value [B, K, T, D], and keys and values of prompts elsewhere, [1, K, P, D] each -> [B, H, T, D].
    attention.c: nothing is padded, repeated or put together, and of the scores only a few rows exist."""

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
        result, lses = attend(query, key, value, prompts, sequences, scaling, window)
        ctx.save_for_backward(query, key, value, result, lses, *prompts)
        ctx.sequences, ctx.scaling, ctx.window, ctx.joins = sequences, scaling, window, joins
        return result.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        gradient = gradient.transpose(1, 2).contiguous()
        gradients = attention_gradients(
            gradient,
            *ctx.saved_tensors,
            sequences=ctx.sequences,
            scaling=ctx.scaling,
            window=ctx.window,
            joins=ctx.joins,
        )
        query, key, value, *outside = (tensor.transpose(1, 2) for tensor in gradients)
        return query, key, value, None, None, None, None, *outside


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompts: list[Tensor],
    sequences: Sequences,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """query [B, T, H, D], key and value [B, T, K, D], prompts elsewhere [1, P, K, D], keys and values in turn -> [B, T, H, D], and the
    log-sum-exps of the scores [H, B * T]."""
    shape = _shape(query, key, sequences, scaling, window)
    heads, key_heads, _, tokens, *_ = shape
    threads = threads_for(heads * sequences.pairs)
    parts = key_heads if len(sequences.rows) * key_heads >= 2 * threads else heads
    result, lses = torch.empty_like(query), query.new_empty(heads, tokens)
    scratch = _room(query, sequences.longest, threads, layouts=2, scores=1)
    tensors = map(pointer, (query, key, value, scratch, result, lses))
    rows, outside = pointer(sequences.rows), _pointers(prompts)
    attention_library().forward(threads, parts, *shape, len(sequences.rows), rows, *outside, *tensors)
    return result, lses


def attention_gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    lses: Tensor,
    *prompts: Tensor,
    sequences: Sequences,
    scaling: float | None,
    window: int | None,
    joins: list[Join],
) -> list[Tensor]:
    """Of query, key, value and the prompts, from that of what `attend` gave, in its shapes."""
    shape = _shape(query, key, sequences, scaling, window)
    heads, key_heads, size, tokens, *_ = shape
    threads, groups = threads_for(heads * sequences.pairs), len(sequences.groups) - 1
    parts = key_heads if groups * key_heads >= threads else heads  # what each of them adds up for itself
    grad_query = torch.empty_like(query)
    # Zeros where there are prompts elsewhere: one without completions gets nothing.
    make = query.new_zeros if sequences.elsewhere else query.new_empty
    shares = make(2, tokens + sum(sequences.elsewhere), parts, size)
    scratch = _room(query, sequences.longest, threads, layouts=3, scores=2)
    tensors = map(pointer, (query, key, value, result, lses, gradient, scratch, grad_query, *shares))
    plan = (groups, pointer(sequences.groups), pointer(sequences.rows), *_pointers(list(prompts)))
    attention_library().backward(threads, parts, *shape, *plan, *tensors)
    if parts != key_heads:
        shares = shares.unflatten(2, (key_heads, -1)).sum(3)
    for first, *leaves in joins:
        for share, leaf in zip(shares, leaves, strict=True):
            if leaf.grad is not None:
                share[first : first + leaf.shape[2]] += leaf.grad[0].transpose(0, 1)
    own, *others = shares.split([tokens, *sequences.elsewhere], dim=1)
    grad_key, grad_value = (share.view(key.shape) for share in own)
    # A copy: a leaf would keep the whole of what it is a part of.
    return [grad_query, grad_key, grad_value, *(share[None].clone() for pair in others for share in pair)]


def _shape(
    query: Tensor, key: Tensor, sequences: Sequences, scaling: float | None, window: int | None
) -> tuple[int, int, int, int, int, int, float]:
    """As attention.c has it."""
    batch, length, heads, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    return heads, key.shape[2], size, batch * length, window or 0, sequences.longest, scaling


def _room(like: Tensor, longest: int, threads: int, *, layouts: int, scores: int) -> Tensor:
    wide, deep = (-(-number // PANEL) * PANEL for number in (longest, like.shape[-1]))
    return like.new_empty(threads * wide * (layouts * deep + scores * ROWS))


def _pointers(prompts: list[Tensor]) -> tuple[ctypes.Array, ctypes.Array]:
    """Where the keys lie, and where the values."""
    kind = ctypes.c_void_p * (len(prompts) // 2)
    keys, values = (kind(*map(pointer, prompts[half::2])) for half in (0, 1))
    return keys, values
