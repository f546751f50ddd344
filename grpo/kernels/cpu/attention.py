"""Attention by attention.c: a row of sequences, some of which share a prompt -> what every token sees, in one call.

For float32 on a CPU. Shapes are those of attention.py: query [B, H, T, D], key and value [B, K, T, D].
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable

from grpo.kernels.cpu.compiler import kernels, plain, pointer, threads_for

PANEL, ROWS = 16, 12
"""As in simd.h (ROWS at most): how much room attention.c wants."""


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether attention.c can take them. Under autocast RoPE gives float32, and a value keeps its 16 bits."""
    size = query.shape[-1]
    fits = size % 8 == 0 and key.shape[-1] == value.shape[-1] == size
    return fits and plain(query, key, value, contiguous=False) and kernels() is not None


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
        batch, length, heads, size = query.shape
        tokens, key_heads = batch * length, key.shape[2]
        threads = threads_for(heads * sequences.pairs)
        parts = key_heads if len(sequences.rows) * key_heads >= 2 * threads else heads
        scaling = size**-0.5 if scaling is None else scaling
        shape = (heads, key_heads, size, tokens, window or 0, sequences.longest, scaling)
        result, lses = torch.empty_like(query), query.new_empty(heads, tokens)
        scratch = attention_room(query, size, sequences, threads, learning=False)
        tensors = map(pointer, (query, key, value, scratch, result, lses))
        rows, outside = pointer(sequences.rows), pointers(prompts)
        kernels().attention_forward(threads, parts, *shape, len(sequences.rows), rows, *outside, *tensors)
        ctx.save_for_backward(query, key, value, result, lses, *prompts)
        ctx.sequences, ctx.shape, ctx.joins = sequences, shape, joins
        return result.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        query, key, value, result, lses, *prompts = ctx.saved_tensors
        sequences, (heads, key_heads, size, tokens, *_) = ctx.sequences, ctx.shape
        gradient = gradient.transpose(1, 2).contiguous()
        threads, grad_query = threads_for(heads * sequences.pairs), torch.empty_like(query)
        shares = shares_for(query, sequences, tokens, key_heads, threads)
        scratch = attention_room(query, size, sequences, threads, learning=True)
        tensors = map(pointer, (query, key, value, result, lses, gradient, scratch, grad_query, *shares))
        plan = (len(sequences.groups) - 1, pointer(sequences.groups), pointer(sequences.rows), *pointers(prompts))
        kernels().attention_backward(threads, shares.shape[2], *ctx.shape, *plan, *tensors)
        grads, outside = gathered(shares, sequences, tokens, key_heads, ctx.joins)
        grad_key, grad_value = (grad.view(key.shape).transpose(1, 2) for grad in grads)
        return grad_query.transpose(1, 2), grad_key, grad_value, None, None, None, None, *outside


def attention_room(like: Tensor, size: int, sequences: Sequences, threads: int, *, learning: bool) -> Tensor:
    """What attention.c wants for itself, on the way there or, `learning`, back, for heads of `size`."""
    layouts, scores = (3, 2) if learning else (2, 1)
    wide, deep = (-(-number // PANEL) * PANEL for number in (sequences.longest, size))
    return like.new_empty(threads * wide * (layouts * deep + scores * ROWS))


def shares_for(query: Tensor, sequences: Sequences, tokens: int, key_heads: int, threads: int) -> Tensor:
    """For query [..., H, D]: [2, T and the tokens of prompts elsewhere, parts, D], where attention.c adds up gradients of keys and of
    values: one part for each key head, or for each head, where that keeps more threads busy."""
    heads, size = query.shape[-2:]
    parts = key_heads if (len(sequences.groups) - 1) * key_heads >= threads else heads
    # Zeros where there are prompts elsewhere: one without completions gets nothing.
    make = query.new_zeros if sequences.elsewhere else query.new_empty
    return make(2, tokens + sum(sequences.elsewhere), parts, size)


def gathered(
    shares: Tensor, sequences: Sequences, tokens: int, key_heads: int, joins: list[Join]
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of keys and values [2, T, K, D], with what `joins` add, and of the prompts elsewhere, [1, K, P, D] each."""
    if shares.shape[2] != key_heads:
        shares = shares.unflatten(2, (key_heads, -1)).sum(3)
    for first, *leaves in joins:
        for share, leaf in zip(shares, leaves, strict=True):
            if leaf.grad is not None:
                share[first : first + leaf.shape[2]] += leaf.grad[0].transpose(0, 1)
    own, *others = shares.split([tokens, *sequences.elsewhere], dim=1)
    # A copy: a leaf would keep the whole of what it is a part of.
    return own, [share[None].transpose(1, 2).clone() for pair in others for share in pair]


def pointers(prompts: list[Tensor]) -> tuple[ctypes.Array, ctypes.Array]:
    """Where the keys lie, and where the values."""
    kind = ctypes.c_void_p * (len(prompts) // 2)
    keys, values = (kind(*map(pointer, prompts[half::2])) for half in (0, 1))
    return keys, values
