"""Sampling: logits [B, V] and one uniform number per row -> tokens [B] and their logprobs [B]."""

import functools
import math

import torch
from torch import Tensor

from grpo.kernels.cpu import ops
from grpo.kernels.cpu.compiler import c_kernel, is_readable

BLOCK = 128
"""Tokens per block of the two-level inversion."""


def draw_tokens(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row from softmax(logits / temperature) by inverting the cumulative distribution.

    The inversion has two levels: first the block of BLOCK tokens, then the token in the block. A cumulative sum over
    the whole vocabulary would be slow, and in float32 its last digits would be wrong. The short cumulative sums are
    float64.

    Args:
        logits_BV: [B, V], any float dtype.
        uniform_B: [B] float64 in [0, 1), the point at which each row's distribution is inverted.
        temperature: divides the logits. 0 takes the most likely token.

    Returns:
        Tokens [B] int64, and their logprobs [B] float32 under the distribution drawn from (temperature 0: the unscaled
            softmax).
    """
    if c_kernel("sampling", logits_BV) and is_readable(uniform_B, dtype=torch.float64):
        (rows, size), tokens = logits_BV.shape, torch.empty(len(logits_BV), dtype=torch.long)
        blocks, logprobs = uniform_B.new_empty(rows, -(-size // BLOCK)), logits_BV.new_empty(rows)
        ops.draw(logits_BV, uniform_B, temperature, blocks, tokens, logprobs)
        return tokens, logprobs
    logits = logits_BV.float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    weights = logits.softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        whole = weights.shape[-1] // BLOCK * BLOCK
        sums = weights[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
        if whole < weights.shape[-1]:
            sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], -1)
        sums = sums.double()
        block, rest = _invert(sums, uniform_B.double() * sums.sum(-1))
        index = block[:, None] * BLOCK + _block_places(logits.device)
        in_block = weights.gather(-1, index.clamp(max=logits.shape[-1] - 1)).double()
        tokens = block * BLOCK + _invert(in_block.masked_fill_(index >= logits.shape[-1], 0.0), rest)[0]
    return tokens, weights.gather(-1, tokens[:, None]).squeeze(-1).log()


def restrict(
    logits_BV: Tensor,
    temperature: float,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen_BV: Tensor | None = None,
) -> Tensor:
    """Return logits [B, V] float32, divided by the temperature, with -inf where a token may not be drawn.

    In transformers' order: logits of tokens that were seen are divided by repetition_penalty where positive, else
    multiplied (arXiv 1909.05858, section 4.1); temperature (0: left out); the top_k most likely tokens stay (0: all);
    of these the most likely ones whose probabilities add up to top_p (arXiv 1904.09751); of these the ones of at least
    min_p times the largest probability (arXiv 2407.01082). The most likely token always stays.

    Args:
        seen_BV: [B, V] bool: tokens of the prompt and the completion so far. Needed for a repetition_penalty.
    """
    logits = logits_BV.float()
    if repetition_penalty != 1 and seen_BV is not None:
        penalized = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(seen_BV, penalized, logits)
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(-1)
        removed = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(-1, index, removed), -torch.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


@functools.cache
def _block_places(device: torch.device) -> Tensor:
    return torch.arange(BLOCK, device=device)


def _invert(weights: Tensor, threshold_B: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative sums of weights [B, K] (float64) at thresholds [B].

    An index of weight 0 is never returned: a threshold at or beyond the total, which rounding can cause, is lowered to
    just below it.

    Returns:
        The first index [B] whose cumulative sum exceeds the threshold, and the threshold minus the sum before that
            index [B].
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    threshold = torch.minimum(threshold_B, torch.nextafter(total, torch.zeros_like(total)))[:, None]
    index = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=weights.shape[-1] - 1)
    before = cumulative.gather(-1, index) - weights.gather(-1, index)
    return index.squeeze(-1), (threshold - before).squeeze(-1).clamp_(min=0)
