"""Products: linear layers, embeddings and the head in float32 on a CPU, by gemm.c -> values and gradients.

gemm.c is made for the few hundred rows of a packed batch. Alone it is little faster than general libraries, and most for the head
(docs/speed.md). Where there is no C compiler, in 16 bits and on GPUs, it is torch that multiplies.

Within `accumulate_grads_inplace`, a backward pass adds the gradients of these weights to .grad by itself, instead of making each of them,
as large as its weight, for autograd to add and throw away.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from grpo.kernels.cpu.compiler import kernels, plain, pointer, threads_for

DEPTH, WIDTH, HEIGHT, ROWS = 384, 1024, 96, 12
"""As in gemm.c and simd.h (ROWS at most): how much room they want."""


FEWEST_ROWS = 64
"""Laying out a weight costs as much as multiplying some ten rows with it: fewer rows than these are not for gemm.c."""


def fits(rows: Tensor, *tensors: Tensor | None) -> bool:
    """Whether gemm.c can read all of them, None left out, and may (under autocast others choose the dtype), and whether that
    pays for so many rows [..., K]."""
    return (
        0 < FEWEST_ROWS * rows.shape[-1] <= rows.numel()
        and not torch.is_autocast_enabled("cpu")
        and plain(rows, *(tensor for tensor in tensors if tensor is not None))
        and kernels() is not None
    )


def product(
    a: Tensor,
    b: Tensor,
    *,
    a_across: bool = False,
    b_across: bool = False,
    bias: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """a [M, K] @ b [K, N] + bias [N] -> [M, N]. `a_across`: a is given as [K, M]; `b_across`: b as [N, K]. Added to `into` and returned,
    where that is given instead of a bias. For tensors that `fits`; sums do not depend on the number of threads."""
    assert bias is None or into is None
    rows, terms = a.shape[::-1] if a_across else a.shape
    columns = b.shape[0] if b_across else b.shape[1]
    threads = threads_for(rows * columns + rows * terms)
    result = a.new_empty(rows, columns) if into is None else into
    tensors = (a, b, bias, product_room(threads), result)
    shape = (rows, columns, terms, a_across, b_across, into is not None)
    kernels().product(threads, *shape, *map(pointer, tensors))
    return result


_rooms = threading.local()


def product_room(threads: int) -> Tensor:
    """Room for gemm.c to lay out what it multiplies: one to two megabytes, of each thread of Python its own."""
    size = DEPTH * (WIDTH + threads * (HEIGHT + ROWS))
    if getattr(_rooms, "size", 0) < size:
        with _disable_current_modes():  # it outlives a simulation (grpo/tools/memory.py), which does not count it
            _rooms.size, _rooms.tensor = size, torch.empty(size)
    tensor: Tensor = _rooms.tensor
    return tensor


_accumulating = False


@contextlib.contextmanager
def accumulate_grads_inplace() -> Iterator[None]:
    """Within, backward passes add to .grad of the weights that are multiplied here, and autograd does not hear of it: for weights
    of this process alone, since what exchanges gradients (DDP, FSDP) waits for autograd."""
    global _accumulating
    _accumulating = True
    try:
        yield
    finally:
        _accumulating = False


def gradient_of(weight: Tensor) -> Tensor | None:
    """Where to add the gradient of `weight`; None where autograd is to have it."""
    if not _accumulating or not weight.is_leaf or not weight.requires_grad or not plain(weight):
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad if plain(weight.grad) else None


class LinearProduct(torch.autograd.Function):
    """states [..., I], weight [O, I], bias [O] or None -> [..., O]"""

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(states if ctx.needs_input_grad[1] else None, weight)
        ctx.weight = weight  # itself, whatever is done to what is saved
        return product(states.flatten(0, -2), weight, b_across=True, bias=bias).view(*states.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[no-untyped-def]
        states, weight = ctx.saved_tensors
        shape, gradient = gradient.shape[:-1], gradient.flatten(0, -2).contiguous()
        grad_states = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_states = product(gradient, weight).view(*shape, -1)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(gradient, states.flatten(0, -2), ctx.weight)
        return grad_states, grad_weight, gradient.sum(0) if ctx.needs_input_grad[2] else None


def weight_gradient(gradient: Tensor, states: Tensor, weight: Tensor) -> Tensor | None:
    """[T, O] and [T, I] -> [O, I] of `weight`; None if it is already where it belongs."""
    there = gradient_of(weight)
    made = product(gradient, states, a_across=True, into=there)
    return made if there is None else None


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if not fits(input, self.weight, self.bias):
            return F.linear(input, self.weight, self.bias)
        states: Tensor = LinearProduct.apply(input, self.weight, self.bias)
        return states


class Embedding(nn.Embedding):
    """nn.Embedding of token ids that are often few beside the vocabulary: within `accumulate_grads_inplace`, only their rows of the gradient are
    touched."""

    def forward(self, input: Tensor) -> Tensor:
        plainly = self.max_norm is None and not self.scale_grad_by_freq and not self.sparse
        if not plainly or not plain(self.weight) or not torch.is_grad_enabled():
            return super().forward(input)
        states: Tensor = _Lookup.apply(input, self.weight, self.padding_idx)
        return states


class _Lookup(torch.autograd.Function):
    """ids [...] and weight [V, H] -> [..., H]"""

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor | None, None]:  # type: ignore[no-untyped-def]
        if not ctx.needs_input_grad[1]:
            return None, None, None
        ids = ctx.saved_tensors[0].flatten()
        there = gradient_of(ctx.weight)
        made = torch.zeros_like(ctx.weight) if there is None else there
        rows = gradient.flatten(0, -2)
        if ctx.padding is not None:
            rows = rows * (ids != ctx.padding)[:, None]
        made.index_add_(0, ids, rows)
        return None, made if there is None else None, None


def use_products(model: nn.Module) -> None:
    """Give the plain linear layers and embeddings of `model` the products of this file."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is nn.Embedding:
            module.__class__ = Embedding
