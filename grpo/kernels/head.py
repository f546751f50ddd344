"""Output head: hidden states -> logits, and token logprobs in blocks of the vocabulary.

All logits [N, V] never exist at once. Sampling and training both compute logits with `head_logits`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.cpu.panels import Panels, has_bfloat16
from grpo.kernels.cpu.panels import library as panels_library
from grpo.kernels.gradients import gradient_buffer
from grpo.kernels.registry import is_on

CHUNK_BYTES = {"cpu": 16 * 2**20}
CHUNK_BYTES_ELSEWHERE = 256 * 2**20
"""Maximum float32 bytes of logits that exist at a time, by device. Temporaries take up to twice as much."""

ROW_MULTIPLE = 32
"""oneDNN products round their rows up to a multiple of this: oneDNN compiles and keeps half a megabyte of code for
each number of rows."""


@dataclass(frozen=True)
class LogitTransform:
    """Transformation of the head's product: logits = c tanh(scale (W h + b) / c), or scale (W h + b) without softcap.

    The bias b is a parameter of the head and is passed separately.
    """

    scale: float = 1.0
    softcap: float | None = None
    """c"""

    def apply_(self, logits: Tensor, bias: Tensor | None = None) -> Tensor:
        """Transform logits [n, V] in place. `bias`: [V], float32."""
        if bias is not None:
            logits.add_(bias)
        if self.softcap is not None:
            return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Return d transformed / d (W h + b), from the transformed logits."""
        if self.softcap is None:
            return self.scale
        return (1 - (transformed / self.softcap).square()).mul_(self.scale)


IDENTITY = LogitTransform()


def training_dtypes(device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes that the head's products read in training: forward and backward.

    Logits are never rounded to 16 bits. Under autocast on a CPU, the forward product therefore reads bfloat16 only if
    C has a product with a float32 result (grpo/kernels/cpu/panels.py).
    """
    forward = product_dtype(device)
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return forward, forward
    narrow = torch.get_autocast_dtype("cpu")
    exact = narrow == torch.bfloat16 and is_on("decode_step") and has_bfloat16() and panels_library() is not None
    return narrow if exact else forward, narrow


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that the head's product reads: float32, except under autocast on CUDA.

    There, 16-bit inputs with float32 sums and a float32 result are many times faster. The softmax is always float32.
    """
    if device.type == "cuda" and torch.is_autocast_enabled("cuda") and is_on("narrow_head"):
        return torch.get_autocast_dtype("cuda")
    return torch.float32


def head_logits(hidden_NH: Tensor, head_VH: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the logits of the output head.

    Args:
        hidden_NH: [N, H], any float dtype.
        head_VH: [V, H], any float dtype.
        dtype: dtype of the product's inputs (`product_dtype`). Sums are float32.

    Returns:
        [N, V] float32.
    """
    with torch.autocast(hidden_NH.device.type, enabled=False):
        if dtype == torch.bfloat16 and hidden_NH.is_cpu:
            return Panels.of(head_VH, dtype).product(hidden_NH)
        if dtype != torch.float32:
            return torch.mm(hidden_NH.to(dtype), head_VH.to(dtype).T, out_dtype=torch.float32)
        hidden, head = hidden_NH.float(), head_VH.float()
        if hidden.is_cpu and is_on("onednn") and torch.backends.mkldnn.is_available():
            rows = len(hidden)  # oneDNN: up to twice as fast as MKL for a product this wide
            if rows > ROW_MULTIPLE:
                hidden = F.pad(hidden, (0, 0, 0, -rows % ROW_MULTIPLE))
            return torch.ops.mkldnn._linear_pointwise(hidden, head, None, "none", [], "")[:rows]
        return hidden @ head.T


class TokenLogprobs(torch.autograd.Function):
    """Token logprobs: hidden [N, H], head [V, H], bias [V] or None, targets [N] -> logprobs [N] and entropies [N].

    Both results are float32, in nats.

    The vocabulary is processed in blocks. Each pass reads each block of the head once, and writes its gradient once,
    for any number of tokens. The backward pass recomputes the logits of every block but the last, which are kept. This
    does not raise the peak: the backward pass follows at once, and needs the memory of one block anyway.

    d logp / d logits = (onehot(target) - p) / temperature
    d H    / d logits = -p * (log p + H) / temperature
    d logits / d (W h + b) = scale, times 1 - (logits / c)^2 with a softcap c
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden,
        head,
        bias,
        targets,
        temperature,
        entropy_gradient,
        dtypes,
        accumulate_grads_inplace,
        transform,
    ):
        weight, blocks = _cast(head, dtypes[0]), _blocks(len(targets), head)
        if transform.softcap is None:  # one division for both
            temperature, transform = temperature / transform.scale, IDENTITY
        lse_BN, logprob_BN, entropy_BN = hidden.new_empty(3, len(blocks), len(targets), dtype=torch.float32)
        for index, block in enumerate(blocks):
            logits = transform.apply_(head_logits(hidden, weight[block], dtypes[0]), _part(bias, block))
            own = targets.sub(block.start).clamp_(0, block.stop - block.start - 1)
            lse_BN[index], logprob_BN[index], entropy_BN[index] = softmax(logits, own, temperature)
        lses, logprobs, entropies = lse_BN[0], logprob_BN[0], entropy_BN[0]
        if len(blocks) > 1:
            lses = lse_BN.logsumexp(0)
            log_share_BN = lse_BN - lses  # log of each block's share of the total sum
            entropies = (log_share_BN.exp() * (entropy_BN - log_share_BN)).sum(0)
            place = targets.div(blocks[0].stop, rounding_mode="floor")[None]
            logprobs = (logprob_BN + log_share_BN).gather(0, place)[0]
        ctx.last = logits if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, head, bias, targets, lses, entropies)
        ctx.transform = transform
        ctx.head = head  # the parameter itself: saved-tensor hooks may replace `head` by a copy
        ctx.temperature, ctx.entropy_gradient, ctx.dtypes = temperature, entropy_gradient, dtypes
        ctx.in_place = accumulate_grads_inplace
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies):  # type: ignore[no-untyped-def]
        hidden, head, bias, targets, lses, entropies = ctx.saved_tensors
        forward_dtype, dtype = ctx.dtypes
        weight, narrow = _cast(head, forward_dtype), hidden.to(dtype)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_head = buffer = gradient_buffer(ctx.head, ctx.in_place) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[1] and buffer is None:
            grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        scale, slope = grad_logprobs.float() / ctx.temperature, None
        if ctx.entropy_gradient:
            slope = grad_entropies.float() / ctx.temperature
        logits, ctx.last = ctx.last, None
        for block in reversed(_blocks(len(targets), head)):
            if logits is None:
                logits = ctx.transform.apply_(head_logits(hidden, weight[block], forward_dtype), _part(bias, block))
            own = targets - block.start
            own = torch.where((own >= 0) & (targets < block.stop), own, -1)
            capped = ctx.transform.softcap is not None
            product_slope = ctx.transform.slope(logits) if capped else None
            made_dtype = torch.float32 if capped or bias is not None else dtype
            grad_logits = softmax_backward(logits, own, ctx.temperature, lses, scale, slope, entropies, made_dtype)
            logits = None
            if product_slope is not None:
                grad_logits.mul_(product_slope)
            if grad_bias is not None:
                grad_bias[block] = grad_logits.sum(0)
            grad_logits = grad_logits.to(dtype)
            if grad_hidden is not None:
                _add_product(grad_hidden, grad_logits, weight[block].to(dtype))
            if grad_head is not None:
                _add_product(grad_head[block], grad_logits.T, narrow)
        made = grad_head.to(head.dtype) if grad_head is not None and buffer is None else None
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        made_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, made, made_bias, None, None, None, None, None, None


def _part(bias: Tensor | None, block: slice) -> Tensor | None:
    return None if bias is None else bias[block].float()


def _cast(head: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the head in the dtype of the products. On a CPU it stays as it is: each block is cast when it is read."""
    return head if head.is_cpu else head.to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`. On CUDA, a product of 16-bit inputs is summed and returned in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


def softmax(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the statistics of a block of logits.

    Args:
        logits: [n, V] float32.
        targets: [n] token ids.
        temperature: divides the logits.

    Returns:
        The log-sum-exp of logits / temperature, the logprobs of the targets, and the entropies, [n] each.
    """
    largest = logits.amax(-1) / temperature
    shifted = (logits / temperature).sub_(largest[:, None])
    own = shifted.gather(-1, targets[:, None]).squeeze(-1)
    weights = shifted.exp()
    total = weights.sum(-1)
    wide = torch.float32 if logits.is_mps else torch.float64  # Apple GPUs have no float64
    lse = total.to(wide).log()  # float32 would round once more where the largest logit is added
    # H = lse - sum(p * logit)
    entropies = lse - torch.linalg.vecdot(weights, shifted).to(wide) / total
    return (lse + largest).float(), (own - lse).float(), entropies.float()


def softmax_backward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    lse: Tensor,
    scale: Tensor,
    slope: Tensor | None,
    entropies: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient of a block of logits in `dtype`.

    Args:
        logits: [n, V] float32, overwritten.
        targets: [n] index of each target in the block. -1: in another block.
        temperature: divides the logits.
        lse: [n], of logits / temperature, over the whole vocabulary.
        scale: [n], gradient of the targets' logprobs / temperature.
        slope: [n], gradient of the entropies / temperature. None: they have none.
        entropies: [n].
        dtype: dtype of the result.
    """
    logprobs = _scaled(logits, temperature).sub_(lse[:, None])
    factor = scale[:, None]
    if slope is not None:
        factor = (logprobs + entropies[:, None]).mul_(slope[:, None]).add_(factor)
    gradient = logprobs.exp_().mul_(-factor)
    gradient.scatter_add_(1, targets.clamp(min=0)[:, None], (scale * (targets >= 0))[:, None])
    return gradient.to(dtype)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits.div_(temperature)


def _blocks(tokens: int, head: Tensor) -> list[slice]:
    """Split the vocabulary into blocks of at most CHUNK_BYTES of logits.

    All blocks but the last have the same size, a multiple of 64, so that products stay aligned.
    """
    size = CHUNK_BYTES.get(head.device.type, CHUNK_BYTES_ELSEWHERE) // (4 * max(tokens, 1))
    size = min(max(64, size // 64 * 64), len(head))
    return [slice(start, min(start + size, len(head))) for start in range(0, len(head), size)]
