"""Logprobs: hidden states -> log p(token) and entropy per token, in chunks, so that [N, V] never exists at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.cpu.compiler import kernels, plain, pointer, threads_for
from grpo.kernels.cpu.gemm import fits, gradient_of, product

CHUNK_BYTES = {"cpu": 16 * 2**20}
CHUNK_BYTES_ELSEWHERE = 256 * 2**20
"""Float32 bytes of logits that exist at a time (and up to twice as much for what is made of them): enough rows to keep the
device busy, no more."""

ROWS = 32
"""Rows of a product on a CPU are rounded up to multiples of this."""


def product_dtype(device: torch.device) -> torch.dtype:
    """The dtype that the head's product reads: float32, except under autocast on CUDA, where 16-bit inputs with float32
    sums and a float32 result are many times faster. The softmax is float32 everywhere."""
    if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return torch.float32


def head_logits(hidden_NH: Tensor, head_VH: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, H] and [V, H] -> float32 logits [N, V]. The sampler and the trainer both come through here."""
    with torch.autocast(hidden_NH.device.type, enabled=False):
        if dtype == torch.float32:
            hidden, head = hidden_NH.float(), head_VH.float()
            if fits(hidden, head):
                return product(hidden, head, b_across=True)
            if (
                hidden.is_cpu and torch.backends.mkldnn.is_available()
            ):  # for a product this wide, up to twice as fast as MKL
                rows = len(hidden)
                if rows > ROWS:  # oneDNN compiles, and keeps, half a megabyte for every number of rows that it meets
                    hidden = F.pad(hidden, (0, 0, 0, -rows % ROWS))
                return torch.ops.mkldnn._linear_pointwise(hidden, head, None, "none", [], "")[:rows]
            return hidden @ head.T
        return torch.mm(hidden_NH.to(dtype), head_VH.to(dtype).T, out_dtype=torch.float32)


def token_logprobs(
    hidden_NH: Tensor, head_VH: Tensor, targets_N: Tensor, temperature: float = 1.0, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of the distribution it was drawn from, p = softmax(hidden @ head.T / temperature).

    hidden_NH [N, H] and head_VH [V, H] in any float dtype, targets_N [N] -> logprobs [N], entropies [N], both float32 in
    nats. Products run in `product_dtype`, the softmax in float32. Gradients flow to hidden and head through the
    logprobs; the entropy is for the logs and carries one only where `entropy_gradient` asks for it (an entropy bonus).
    """
    dtype = product_dtype(hidden_NH.device)
    return _TokenLogprobs.apply(hidden_NH, head_VH, targets_N, temperature, entropy_gradient, dtype)


class _TokenLogprobs(torch.autograd.Function):
    """Keeps hidden, head, targets, one log-sum-exp per token, and the probabilities of the last chunk (times their sum); the
    backward pass starts with that chunk, and forms the logits of every other one again. The backward pass of the head
    follows its forward pass at once, and would have a chunk in memory too: what is kept costs nothing, and a batch of one
    chunk is done in one pass.

    d logp / d logits = (onehot(target) - p) / temperature
    d H    / d logits = -p * (log p + H) / temperature
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, entropy_gradient, dtype):  # type: ignore[no-untyped-def]
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropies, lses = torch.empty_like(logprobs), torch.empty_like(logprobs)
        weight = head.to(dtype)
        for part in _chunks(len(targets), head):
            logits = head_logits(hidden[part], weight, dtype)
            weights, total, lses[part], logprobs[part], entropies[part] = _softmax(logits, targets[part], temperature)
        ctx.last = (weights, total) if len(targets) and any(ctx.needs_input_grad) and not entropy_gradient else None
        ctx.save_for_backward(hidden, head, targets, lses, entropies)
        ctx.head = head  # itself, whatever is done to what is saved
        ctx.temperature, ctx.entropy_gradient, ctx.dtype = temperature, entropy_gradient, dtype
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies):  # type: ignore[no-untyped-def]
        hidden, head, targets, lses, entropies = ctx.saved_tensors
        weight = head.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Accumulated in float32: chunk by chunk in bfloat16 would round every chunk's share away.
        grad_head = there = gradient_of(ctx.head) if ctx.needs_input_grad[1] and head.dtype == torch.float32 else None
        if ctx.needs_input_grad[1] and there is None:
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
            own = ctx.dtype == torch.float32 and fits(grad_logits, weight, hidden)
            if grad_hidden is not None:
                grad_hidden[part] = product(grad_logits, weight) if own else (grad_logits @ weight).to(hidden.dtype)
            if grad_head is not None:
                if own:
                    product(grad_logits, hidden[part], a_across=True, into=grad_head)
                elif ctx.dtype == torch.float32:
                    grad_head.addmm_(grad_logits.T, hidden[part].float())
                else:
                    grad_head += torch.mm(grad_logits.T, hidden[part].to(ctx.dtype), out_dtype=torch.float32)
        made = grad_head.to(head.dtype) if grad_head is not None and there is None else None
        return grad_hidden, made, None, None, None, None


def _softmax(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits [n, V], which are overwritten, and targets [n] -> weights [n, V] and their sums [n]: p = weight / sum; and [n] each the
    log-sum-exp of logits / temperature, the target's logprob, the entropy."""
    library = kernels() if plain(logits) and targets.is_contiguous() else None
    if library is not None:
        rows, size = logits.shape
        logprobs, entropies, total, lse = logits.new_empty(4, rows)
        tensors = (logits, targets, logprobs, entropies, total, lse)
        library.softmax(threads_for(logits.numel()), rows, size, temperature, *map(pointer, tensors))
        return logits, total, lse, logprobs, entropies
    # The fewest passes over [n, V].
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
