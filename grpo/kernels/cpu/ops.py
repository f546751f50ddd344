"""C functions as torch operators: they write their results into tensors that the caller allocated.

Each has a fake implementation that does nothing, since operators allocate nothing. Code that calls them can therefore
be traced, and its memory estimated, on fake tensors (grpo/tools/memory.py). An operator adds about 3 us to a call.
Operators have no gradients: they are called inside autograd functions.

Tensors are contiguous and on the CPU. They are float32 unless an operator says otherwise (ids and indices int64,
uniform numbers float64). `library()` must not be None.
"""

import ctypes
from collections import Counter

import torch
from torch import Tensor

from grpo.kernels.cpu.compiler import library, pointer, threads_for

PANEL, ROWS = 16, 12
"""As in simd.h (its largest ROWS). They determine the size of attention's workspace."""

calls: Counter[str] = Counter()
"""Calls of each C function in this process. The self-test checks that a kernel was reached."""

_operators = torch.library.Library("grpo", "DEF")


def operator(schema: str):  # type: ignore[no-untyped-def]
    """Return a decorator that turns an implementation into the operator `grpo::NAME` with `schema` and no result."""

    def register(implementation):  # type: ignore[no-untyped-def]
        name = implementation.__name__

        def counted(*arguments):  # type: ignore[no-untyped-def]
            calls[name] += 1
            implementation(*arguments)

        _operators.define(f"{name}({schema}) -> ()")
        _operators.impl(name, counted, "CPU")
        torch.library.register_fake(f"grpo::{name}", lambda *_: None, lib=_operators)
        return getattr(torch.ops.grpo, name).default

    return register


@operator("Tensor hidden, Tensor weight, float epsilon, Tensor(a!) scale, Tensor(b!) result")
def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float, scale: Tensor, result: Tensor) -> None:
    """result = weight * hidden * scale with scale = 1 / rms(hidden), over the last dimension.

    `scale` has one number per row. `result` is float32 or bfloat16.
    """
    shape = (threads_for(hidden.numel()), scale.numel(), hidden.shape[-1], epsilon)
    _for(result, "norm")(*shape, *map(pointer, (hidden, weight, scale, result)))


@operator(
    "Tensor hidden, Tensor weight, Tensor scale, Tensor gradient, Tensor? add, Tensor(a!) grad_hidden,"
    " Tensor(b!) grad_weight"
)
def rms_norm_backward(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor,
    gradient: Tensor,
    add: Tensor | None,
    grad_hidden: Tensor,
    grad_weight: Tensor,
) -> None:
    """grad_hidden = the gradient of `hidden`, plus `add`.

    grad_weight [threads, size], zeros before the call, receives partial sums of the gradient of `weight`.
    """
    tensors = (hidden, weight, scale, gradient, add, grad_hidden, grad_weight)
    _for(gradient, "norm_backward")(len(grad_weight), scale.numel(), hidden.shape[-1], *map(pointer, tensors))


@operator("Tensor gates_ups, Tensor(a!) result")
def swiglu_rows(gates_ups: Tensor, result: Tensor) -> None:
    """result [T, I] = silu(gate) * up, with gates_ups [T, 2 I]. Both float32 or both bfloat16."""
    shape = (threads_for(result.numel()), *result.shape)
    _for(result, "swiglu_rows")(*shape, *map(pointer, (gates_ups, result)))


@operator("Tensor gates_ups, Tensor gradient, Tensor(a!) grad_gates_ups")
def swiglu_rows_backward(gates_ups: Tensor, gradient: Tensor, grad_gates_ups: Tensor) -> None:
    """Gradient of gates_ups [T, 2 I] from that of the result [T, I]."""
    tensors = (gates_ups, gradient, grad_gates_ups)
    shape = (threads_for(gradient.numel()), *gradient.shape)
    _for(gradient, "swiglu_rows_backward")(*shape, *map(pointer, tensors))


@operator("Tensor mixed, Tensor? cos, Tensor? sin, Tensor(a!) query, Tensor(b!) key, Tensor(c!) value")
def split_heads(
    mixed: Tensor, cos: Tensor | None, sin: Tensor | None, query: Tensor, key: Tensor, value: Tensor
) -> None:
    """Split mixed [T, (H + 2 K) D], float32 or bfloat16, into query [T, H, D], key and value [T, K, D], float32.

    Query and key are rotated by cos and sin [T, D] unless those are None.
    """
    shape = (threads_for(mixed.numel()), len(mixed), query.shape[1], key.shape[1], query.shape[2])
    _for(mixed, "split_heads")(*shape, *map(pointer, (mixed, cos, sin, query, key, value)))


@operator("Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor? cos, Tensor? sin, Tensor(a!) grad_mixed")
def join_heads(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor | None, sin: Tensor | None, grad_mixed: Tensor
) -> None:
    """Gradient of `split_heads`: grad_mixed from the gradients of query, key and value."""
    shape = (len(grad_mixed), grad_query.shape[1], grad_key.shape[1], grad_query.shape[2])
    tensors = (grad_query, grad_key, grad_value, cos, sin, grad_mixed)
    _for(grad_mixed, "join_heads")(threads_for(grad_mixed.numel()), *shape, *map(pointer, tensors))


def _for(tensor: Tensor, name: str):  # type: ignore[no-untyped-def]
    """Return the C function `name` for the dtype of `tensor`, float32 or bfloat16."""
    return getattr(library(), f"{name}_bf16" if tensor.dtype == torch.bfloat16 else name)


@operator("Tensor gate, Tensor up, Tensor(a!) result")
def swiglu(gate: Tensor, up: Tensor, result: Tensor) -> None:
    """result = silu(gate) * up."""
    library().swiglu(threads_for(gate.numel()), gate.numel(), *map(pointer, (gate, up, result)))


@operator("Tensor gate, Tensor up, Tensor gradient, Tensor(a!) grad_gate, Tensor(b!) grad_up")
def swiglu_backward(gate: Tensor, up: Tensor, gradient: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    """Gradients of gate and up. grad_up may share the memory of `gradient`."""
    tensors = (gate, up, gradient, grad_gate, grad_up)
    library().swiglu_backward(threads_for(gate.numel()), gate.numel(), *map(pointer, tensors))


@operator("Tensor states, Tensor cos, Tensor sin, bool back, Tensor(a!) result")
def rotate(states: Tensor, cos: Tensor, sin: Tensor, back: bool, result: Tensor) -> None:
    """Rotary embedding (arXiv 2104.09864) of states [..., heads, D] by cos and sin [..., D].

    `back` applies the inverse rotation, which is the gradient. `result` may be `states`.
    """
    heads, size = states.shape[-2:]
    shape = (threads_for(states.numel()), states.numel() // (heads * size), heads, size, back)
    library().rotate(*shape, *map(pointer, (states, cos, sin, result)))


@operator(
    "Tensor query, Tensor key, Tensor value, Tensor[] prompt_keys, Tensor[] prompt_values, Tensor sequences,"
    " int longest, int threads, int window, float scaling, Tensor(a!) workspace, Tensor(b!) result, Tensor(c!) lse"
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_keys: list[Tensor],
    prompt_values: list[Tensor],
    sequences: Tensor,
    longest: int,
    threads: int,
    window: int,
    scaling: float,
    workspace: Tensor,
    result: Tensor,
    lse: Tensor,
) -> None:
    """Causal attention of the sequences [S, 5] (grpo/kernels/cpu/attention.py) of one row of tokens.

    query and result are [T, H, D], key and value [T, K, D]. lse [H, T] is the log-sum-exp of each token's scores. A
    window of 0 means none.
    """
    (tokens, heads, size), key_heads = query.shape, key.shape[1]
    parts = key_heads if len(sequences) * key_heads >= 2 * threads else heads
    shape = (threads, parts, heads, key_heads, size, tokens, window, longest, scaling)
    tensors = (query, key, value, workspace, result, lse)
    library().attention_forward(
        *shape,
        len(sequences),
        pointer(sequences),
        _pointers(prompt_keys),
        _pointers(prompt_values),
        *map(pointer, tensors),
    )


@operator(
    "Tensor query, Tensor key, Tensor value, Tensor[] prompt_keys, Tensor[] prompt_values, Tensor sequences,"
    " Tensor groups, int longest, int threads, int window, float scaling, Tensor result, Tensor lse, Tensor gradient,"
    " Tensor(a!) workspace, Tensor(b!) grad_query, Tensor(c!) grad_key, Tensor(d!) grad_value"
)
def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_keys: list[Tensor],
    prompt_values: list[Tensor],
    sequences: Tensor,
    groups: Tensor,
    longest: int,
    threads: int,
    window: int,
    scaling: float,
    result: Tensor,
    lse: Tensor,
    gradient: Tensor,
    workspace: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Gradients of `attention`.

    grad_key and grad_value are [T + tokens of the prompts outside the row, parts, D], with parts = K or H.
    """
    (tokens, heads, size), key_heads = query.shape, key.shape[1]
    shape = (threads, grad_key.shape[1], heads, key_heads, size, tokens, window, longest, scaling)
    tensors = (query, key, value, result, lse, gradient, workspace, grad_query, grad_key, grad_value)
    plan = (len(groups) - 1, pointer(groups), pointer(sequences), _pointers(prompt_keys), _pointers(prompt_values))
    library().attention_backward(*shape, *plan, *map(pointer, tensors))


@operator(
    "Tensor logits, Tensor uniforms, float temperature, Tensor(a!) blocks, Tensor(b!) tokens, Tensor(c!) logprobs"
)
def draw(
    logits: Tensor, uniforms: Tensor, temperature: float, blocks: Tensor, tokens: Tensor, logprobs: Tensor
) -> None:
    """Sample tokens [B] and their logprobs [B] from softmax(logits [B, V] / temperature) at `uniforms` [B].

    blocks [B, V / 128], rounded up, is workspace.
    """
    rows, size = logits.shape
    tensors = (logits, uniforms, blocks, tokens, logprobs)
    library().draw(threads_for(logits.numel()), rows, size, temperature, *map(pointer, tensors))


def _pointers(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*map(pointer, tensors))
