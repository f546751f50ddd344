"""Self-test at the start of a run: C kernels against the reference, on this CPU, dtype and number of threads.

The widths are those of the model, and there are enough tokens for every kernel to use its threads. Forward and
backward passes are compared. A kernel that fails, differs from the reference or was not called is switched off with
one line in the log.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from grpo.errors import raise_device_error
from grpo.kernels import layers, reference
from grpo.kernels.attention import GroupSpan, PackedLayout, packed_attention
from grpo.kernels.cpu import ops
from grpo.kernels.cpu.compiler import library
from grpo.kernels.cuda import norms, varlen
from grpo.kernels.description import Layer, Linear, Model
from grpo.kernels.head import IDENTITY, TokenLogprobs
from grpo.kernels.registry import is_on, switch_off
from grpo.kernels.sampling import draw_tokens

log = logging.getLogger(__name__)

FLOAT32_TOLERANCE = 1e-4
"""Maximum relative error: norm of the difference over norm of the reference, for each result and each gradient."""
NORM_WIDTH = 1024
"""Width of the checked RMSNorm where the numbers of heads are not known."""
REACHED = {
    "decoder_layer": ("attention", "attention_backward"),
    "sampling": ("draw",),
}
"""C functions that the check of each kernel must call."""


def run(
    model: Model | None,
    device: torch.device,
    vocabulary: int,
    autocast: torch.dtype | None = None,
    tolerance: float = 0.0,
    heads: tuple[int, int, int] | None = None,
) -> None:
    """Compare the kernels of training and sampling with the reference, and switch off those that fail.

    Does nothing on a CPU without the C library.

    Args:
        model: description of the model to be trained. None if its modules are used.
        device: device of the run.
        vocabulary: number of rows of the output head, of which this process may hold a shard only.
        autocast: dtype of autocast in the layers. None: float32.
        tolerance: maximum relative error of a layer under autocast, instead of FLOAT32_TOLERANCE.
        heads: numbers of query heads and key heads, and head size. None: not known.
    """
    if device.type == "cuda":
        _run_on_cuda(device, vocabulary, autocast, tolerance or FLOAT32_TOLERANCE, heads)
    if device.type != "cpu":
        return
    if library() is None and autocast is None:
        log.info("CPU kernels could not be compiled with '%s'; using PyTorch (slower)", os.environ.get("CC") or "cc")
    if library() is None:
        return
    if model is not None and is_on("decoder_layer"):
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            _judge("decoder_layer", lambda: _check_layers(model), FLOAT32_TOLERANCE if autocast is None else tolerance)
    if is_on("sampling"):
        _judge("sampling", lambda: _check_sampling(vocabulary), FLOAT32_TOLERANCE)


def _run_on_cuda(
    device: torch.device,
    vocabulary: int,
    autocast: torch.dtype | None,
    tolerance: float,
    heads: tuple[int, int, int] | None,
) -> None:
    """Check packed attention, RMSNorms and the head on `device`, in the dtype of the run."""
    lacking = varlen.missing(device)
    if lacking is not None:
        switch_off("varlen_attention", lacking)
    if heads is not None and autocast is not None and varlen.is_available(device):
        _judge("varlen_attention", lambda: attention_error(heads, device, autocast), tolerance)
        if is_on("varlen_attention"):
            _judge("varlen_attention", lambda: attention_leak(heads, device, autocast), 0.0)
    if is_on("fused_norm"):
        width = heads[0] * heads[2] if heads is not None else NORM_WIDTH
        _judge("fused_norm", lambda: norm_error(width, device, torch.float32), FLOAT32_TOLERANCE)
        if autocast is not None and is_on("fused_norm"):
            _judge("fused_norm", lambda: norm_error(width, device, autocast), tolerance)
    if autocast is not None and is_on("narrow_head"):
        _judge("narrow_head", lambda: head_error(vocabulary, device, autocast), tolerance)


def attention_error(heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    """Return the relative error of packed attention in `dtype`: of the result and of all gradients.

    The reference is float32 attention with a mask over the whole row. The row has two groups of different sizes.
    """
    spans = _spans(1)
    tensors = _random_heads(heads, spans[-1].start + spans[-1].length, device, dtype)
    visible = _visible(spans, None).to(device)
    upstream = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(9)).to(device)

    def results(made: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            output = made(*leaves)
            return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(query, key, value, PackedLayout(spans, device), None, None)

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (part.repeat_interleave(heads[0] // heads[1], dim=1) for part in (key, value))
        scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
        return scores.softmax(-1) @ value

    pairs = zip(results(ours, tensors), results(theirs, [tensor.float() for tensor in tensors]), strict=True)
    return max(float((mine.float() - other).norm() / other.norm().clamp(min=1e-30)) for mine, other in pairs)


def attention_leak(heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    """Return how much the result of the first group changes with the tokens of the second: 0 if groups are isolated."""
    spans = _spans(1)
    tensors = _random_heads(heads, spans[-1].start + spans[-1].length, device, dtype)
    first, results = spans[1].start, []
    for _ in range(2):
        query, key, value = tensors
        with torch.no_grad():
            attended = packed_attention(query, key, value, PackedLayout(spans, device), None, None)
        results.append(attended[:, :, :first].float())
        tensors = [torch.cat([tensor[:, :, :first], -3 * tensor[:, :, first:]], 2) for tensor in tensors]
    return float((results[0] - results[1]).abs().max())


def norm_error(width: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the relative error of the RMSNorm of modules in `dtype`: of the result and of both gradients."""
    generator = torch.Generator().manual_seed(4)
    hidden, upstream = (torch.randn(40, width, generator=generator).to(device, dtype) for _ in range(2))
    weight = torch.randn(width, generator=generator).to(device, dtype).requires_grad_()
    return _distance(
        lambda states: norms.rms_norm(states, weight, 1e-6),
        lambda states: reference.rms_norm(states.float(), weight.float(), 1e-6).to(dtype),
        hidden,
        upstream,
        [weight],
    )


def head_error(vocabulary: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the relative error of logprobs and gradients, with products of the head in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(16, 64, generator=generator), torch.randn(vocabulary, 64, generator=generator) / 8
    targets = torch.randint(vocabulary, (16,), generator=generator).to(device)
    upstream = torch.randn(16, generator=generator).to(device)
    hidden, weight = (tensor.to(device, dtype).float() for tensor in (hidden, weight))
    weight.requires_grad_()

    def logprobs(states: Tensor, narrow: bool) -> Tensor:
        kind = dtype if narrow else torch.float32
        made: Tensor = TokenLogprobs.apply(states, weight, None, targets, 1.0, False, (kind, kind), False, IDENTITY)[0]
        return made

    return _distance(
        lambda states: logprobs(states, True), lambda states: logprobs(states, False), hidden, upstream, [weight]
    )


def _random_heads(heads: tuple[int, int, int], tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return random queries [1, H, T, D], keys and values [1, K, T, D]."""
    generator, size = torch.Generator().manual_seed(0), heads[2]
    counts = (heads[0], heads[1], heads[1])
    return [torch.randn(1, count, tokens, size, generator=generator).to(device, dtype) for count in counts]


def _judge(name: str, check: Callable[[], float], tolerance: float) -> None:
    """Switch off kernel `name` if `check` raises or returns more than `tolerance`.

    At the tolerance of float32, it is also switched off if `check` did not call the C functions of the kernel.
    """
    before = Counter(ops.calls)
    try:
        distance = check()
    except (RuntimeError, TypeError, ValueError) as error:  # a kernel, or an argument that this torch does not have
        raise_device_error(error)
        switch_off(name, f"the self-test failed ({str(error).splitlines()[0]})")
        return
    if not distance <= tolerance:  # NaN included
        switch_off(name, f"the self-test differs from the reference by {distance:.1g}")
        if name == "decoder_layer":
            switch_off("attention", "it is a part of decoder_layer")
    elif tolerance == FLOAT32_TOLERANCE and any(
        ops.calls[function] == before[function] for function in REACHED.get(name, ())
    ):
        switch_off(name, "the self-test did not reach it")


def _check_layers(model: Model) -> float:
    """Return the largest error of `_check_layer` over the first layer of each kind."""
    kinds = {_kind(layer): layer for layer in reversed(model.layers)}
    return max(_check_layer(model, _float32(layer)) for layer in kinds.values())


def _kind(layer: Layer) -> tuple[object, ...]:
    """Return what determines the operations of a layer: shapes, biases, adapters, norms of heads, window, rotation."""
    linears = [
        (part.weight.shape, part.bias is None, None if part.adapter is None else part.adapter.a.shape)
        for part in layer.linears
    ]
    return (*linears, len(layer.norms), layer.window, layer.rotary, layer.heads, layer.key_heads)


def _check_layer(model: Model, layer: Layer) -> float:
    """Return the relative error of a layer on random states: of the result and of all gradients."""
    # More than 32,768 numbers in the narrowest tensor: from there on, kernels use threads (compiler.threads_for).
    width = min(len(layer.norm), layer.key_heads * layer.head_size)
    spans = _spans(-(-33_000 // (128 * width)))
    tokens, generator = spans[-1].start + spans[-1].length, torch.Generator().manual_seed(0)
    hidden, upstream = (torch.randn(tokens, len(layer.norm), generator=generator) for _ in range(2))
    positions = torch.tensor([place for span in spans for place in _positions(span)])
    cos, sin = (part[0] for part in model.rotary(hidden[None], positions[None]))
    visible = _visible(spans, layer.window)

    def ours(states: Tensor) -> Tensor:
        return layers.decoder_layer(layer, states, cos, sin, PackedLayout(spans, states.device), False)

    def theirs(states: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return reference.decoder_layer(layer, states, cos, sin, visible)

    return _distance(ours, theirs, hidden, upstream, list(_weights(layer)))


def _check_sampling(vocabulary: int) -> float:
    """Return the maximum error of sampled tokens: of their logprobs, and of their places in the cumulative
    distribution.
    """
    generator = torch.Generator().manual_seed(2)
    rows = max(4, -(-33_000 // vocabulary))
    logits = torch.randn(rows, vocabulary, generator=generator)
    uniforms = torch.rand(rows, generator=generator, dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, uniforms, 1.0)
    probabilities = logits.double().softmax(-1)
    upper = probabilities.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    expected = probabilities.gather(1, tokens[:, None])[:, 0]
    outside = torch.maximum(uniforms - upper, upper - expected - uniforms).clamp(min=0)
    return float(torch.maximum((logprobs - expected.log()).abs(), outside).max())


def _spans(factor: int) -> list[GroupSpan]:
    """Return two groups of 128 * factor tokens in total: a prompt with two completions, and a prompt with one."""
    first = GroupSpan(0, 24 * factor, (40 * factor, 17 * factor))
    return [first, GroupSpan(first.length, 15 * factor, (32 * factor,))]


def _distance(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    states: Tensor,
    upstream: Tensor,
    weights: list[Tensor],
) -> float:
    """Return the maximum relative error of the result and of each gradient.

    A relative error is the norm of the difference over the norm of the reference.
    """
    results = []
    for way in (ours, theirs):
        leaf = states.clone().requires_grad_()
        with torch.enable_grad():
            made = way(leaf)
            results.append([made.detach(), *torch.autograd.grad(made, [leaf, *weights], upstream)])
    return max(
        float((mine - other).norm() / other.norm().clamp(min=1e-30)) for mine, other in zip(*results, strict=True)
    )


def _float32(layer: Layer) -> Layer:
    """Return the layer in float32, with weights that are leaves and require gradients.

    Adapters get random numbers, since b of a new one is 0, and with it the gradient of a. They change the weight by a
    tenth: larger scores would saturate attention, whose gradients then are mostly rounding in 16 bits.
    """

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().float().requires_grad_()

    def random(tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return (torch.randn(tensor.shape, generator=generator) / tensor.shape[1] ** 0.5).requires_grad_()

    def linear(part: Linear) -> Linear:
        adapter = part.adapter
        if adapter is not None:
            a, b = random(adapter.a), random(adapter.b)
            with torch.no_grad():
                b *= 0.1 * part.weight.float().norm() / (adapter.scale * (b @ a)).norm()
            adapter = replace(adapter, a=a, b=b)
        return Linear(leaf(part.weight), None if part.bias is None else leaf(part.bias), adapter)

    query, key, value, out, gate, up, down = (linear(part) for part in layer.linears)
    converted = replace(layer, query=query, key=key, value=value, out=out, gate=gate, up=up, down=down)
    if layer.query_norm is not None and layer.key_norm is not None:
        converted = replace(converted, query_norm=leaf(layer.query_norm), key_norm=leaf(layer.key_norm))
    return replace(converted, norm=leaf(layer.norm), mlp_norm=leaf(layer.mlp_norm))


def _weights(layer: Layer) -> Iterator[Tensor]:
    for linear in layer.linears:
        yield linear.weight
        if linear.bias is not None:
            yield linear.bias
        if linear.adapter is not None:
            yield from (linear.adapter.a, linear.adapter.b)
    yield from layer.norms


def _positions(span: GroupSpan) -> Iterator[int]:
    yield from range(span.prompt_length)
    for length in span.completion_lengths:
        yield from range(span.prompt_length, span.prompt_length + length)


def _visible(spans: list[GroupSpan], window: int | None) -> Tensor:
    """Return [T, T] bool: whether the token of the row attends to that of the column, by the definition of a packed
    group.
    """
    rows = []  # for each token: group, completion (0: the prompt) and position
    for index, span in enumerate(spans):
        numbers = [0] * span.prompt_length
        for number, length in enumerate(span.completion_lengths, 1):
            numbers += [number] * length
        rows += [[index, number, place] for number, place in zip(numbers, _positions(span), strict=True)]
    group, completion, place = torch.tensor(rows).T
    same_part = (completion[:, None] == completion) | (completion == 0)
    distance = place[:, None] - place
    visible = (group[:, None] == group) & same_part & (distance >= 0)
    return visible if window is None else visible & (distance < window)
