"""The output head: hidden states -> logits, and token logprobs chunk by chunk, so that all logits never exist at once.

Sampling and training both go through `head_logits`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.cpu import ops
from grpo.kernels.cpu.compiler import c_kernel
from grpo.kernels.layers import gradient_buffer
from grpo.kernels.registry import is_on

CHUNK_BYTES = {"cpu": 16 * 2**20}
CHUNK_BYTES_ELSEWHERE = 256 * 2**20
"""Float32 bytes of logits that exist at a time (and up to twice as much for what is made of them): enough rows to keep the
device busy, no more."""

ROW_MULTIPLE = 32
"""Rows of a product by oneDNN are rounded up to multiples of this: it compiles, and keeps, half a megabyte for each number of
rows that it meets."""


def product_dtype(device: torch.device) -> torch.dtype:
    """The dtype that the head's product reads: float32, except under autocast on CUDA, where 16-bit inputs with float32
    sums and a float32 result are many times faster. The softmax is float32 everywhere."""
    if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return torch.float32


def head_logits(hidden_NH: Tensor, head_VH: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of the output head.

    Args:
        hidden_NH: [N, H], any float dtype.
        head_VH: [V, H], any float dtype.
        dtype: of the product's inputs (`product_dtype`). Sums are float32.

    Returns:
        [N, V] float32.
    """
    with torch.autocast(hidden_NH.device.type, enabled=False):
        if dtype != torch.float32:
            return torch.mm(hidden_NH.to(dtype), head_VH.to(dtype).T, out_dtype=torch.float32)
        hidden, head = hidden_NH.float(), head_VH.float()
        if hidden.is_cpu and is_on("onednn") and torch.backends.mkldnn.is_available():
            rows = len(hidden)  # for a product this wide, up to twice as fast as MKL
            if rows > ROW_MULTIPLE:
                hidden = F.pad(hidden, (0, 0, 0, -rows % ROW_MULTIPLE))
            return torch.ops.mkldnn._linear_pointwise(hidden, head, None, "none", [], "")[:rows]
        return hidden @ head.T


class TokenLogprobs(torch.autograd.Function):
    """hidden [N, H], head [V, H], targets [N] -> logprobs [N] and entropies [N], float32.

    Keeps hidden, head, targets, one log-sum-exp per token, and the probabilities of the last chunk (times their sum). The
    backward pass starts with that chunk, and forms the logits of every other one again. It follows the forward pass at once,
    and would have a chunk in memory too: what is kept costs nothing, and a batch of one chunk is done in one pass.

    d logp / d logits = (onehot(target) - p) / temperature
    d H    / d logits = -p * (log p + H) / temperature
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden, head, targets, temperature, entropy_gradient, dtype, accumulate_grads_inplace
    ):
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropies, lses = torch.empty_like(logprobs), torch.empty_like(logprobs)
        weight = head.to(dtype)
        for part in _chunks(len(targets), head):
            logits = head_logits(hidden[part], weight, dtype)
            weights, total, lses[part], logprobs[part], entropies[part] = softmax(logits, targets[part], temperature)
        ctx.last = (weights, total) if len(targets) and any(ctx.needs_input_grad) and not entropy_gradient else None
        ctx.save_for_backward(hidden, head, targets, lses, entropies)
        ctx.head = head  # itself, whatever is done to what is saved
        ctx.temperature, ctx.entropy_gradient, ctx.dtype = temperature, entropy_gradient, dtype
        ctx.in_place = accumulate_grads_inplace
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies):  # type: ignore[no-untyped-def]
        hidden, head, targets, lses, entropies = ctx.saved_tensors
        weight = head.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Accumulated in float32: chunk by chunk in bfloat16 would round every chunk's share away.
        grad_head = buffer = gradient_buffer(ctx.head, ctx.in_place) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[1] and buffer is None:
            grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        kept, ctx.last = ctx.last, None
        for part in reversed(_chunks(len(targets), head)):
            scale = (grad_logprobs[part].float() / ctx.temperature)[:, None]
            if kept is not None:
                weights, total = kept
                grad_logits, kept = weights.mul_(-scale / total[:, None]), None
            else:
                logits = _scaled(head_logits(hidden[part], weight, ctx.dtype), ctx.temperature).sub_(lses[part, None])
                if ctx.entropy_gradient:
                    slope = (grad_entropies[part].float() / ctx.temperature)[:, None]
                    factor = (logits + entropies[part, None]).mul_(slope).add_(scale)
                    grad_logits = logits.exp_().mul_(-factor)
                else:
                    grad_logits = logits.exp_().mul_(-scale)
            grad_logits.scatter_add_(-1, targets[part, None], scale)
            grad_logits = grad_logits.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (grad_logits @ weight).to(hidden.dtype)
            if grad_head is not None:
                if ctx.dtype == torch.float32:
                    grad_head.addmm_(grad_logits.T, hidden[part].float())
                else:
                    grad_head += torch.mm(grad_logits.T, hidden[part].to(ctx.dtype), out_dtype=torch.float32)
        made = grad_head.to(head.dtype) if grad_head is not None and buffer is None else None
        return grad_hidden, made, None, None, None, None, None


def softmax(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Softmax of a chunk of logits and what is read off it, in the fewest passes over [n, V].

    Args:
        logits: [n, V] float32, overwritten.
        targets: [n] token ids.
        temperature: divides the logits.

    Returns:
        Weights [n, V] and their sums [n], with p = weight / sum; the log-sum-exp of logits / temperature, the targets'
        logprobs and the entropies, [n] each.
    """
    if c_kernel("token_logprobs", logits) and targets.is_contiguous():
        logprobs, entropies, total, lse = logits.new_empty(4, len(logits))
        ops.softmax(logits, targets, temperature, logprobs, entropies, total, lse)
        return logits, total, lse, logprobs, entropies
    largest = _scaled(logits, temperature).amax(-1)
    weights = logits.sub_(largest[:, None]).exp()
    total = weights.sum(-1)
    lse = total.log()
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - lse
    # H = lse - sum(p * logit)
    entropies = lse - torch.linalg.vecdot(weights, logits) / total
    return weights, total, lse + largest, logprobs, entropies


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits.div_(temperature)


def _chunks(tokens: int, head: Tensor) -> list[slice]:
    size = max(1, CHUNK_BYTES.get(head.device.type, CHUNK_BYTES_ELSEWHERE) // (4 * len(head)))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
