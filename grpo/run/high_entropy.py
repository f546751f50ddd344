"""High-entropy tokens: objective.top_entropy_quantile trains only those whose entropy is among the highest.

Beyond the 80/20 rule (arXiv 2506.01939): the policy gradient comes from the tokens at which the policy is
undecided. The threshold is a quantile over all tokens of the mini-batch and all ranks, so it depends neither on the
packing nor on the number of ranks. It needs the entropies before the first backward pass: one more forward pass.
"""

import torch
from torch import Tensor

from grpo.experience import Packed
from grpo.objectives.correction import quantile
from grpo.policy import Policy
from grpo.runtime.distributed import gather_rows


def high_entropy_masks(policy: Policy, packed: Packed, share: float) -> list[Tensor | None]:
    """Return masks [N] of each batch: the `share` of tokens with the highest entropies. Collective.

    Raises:
        MemoryError, RuntimeError: Memory has run out on a rank; on every rank.
    """
    if share == 1:
        return [None] * len(packed.batches)
    entropies: list[Tensor] = []
    error: BaseException | None = None
    try:
        entropies = policy.entropies(packed.batches)
    except (RuntimeError, MemoryError) as caught:
        if not policy.survives(caught):
            raise
        error = caught
    error = policy.agree_on(error)
    if error is not None:
        raise error
    counted = [values[batch.weights_N != 0] for values, batch in zip(entropies, packed.batches, strict=True)]
    mine = torch.cat(counted[: packed.real]).cpu() if packed.real else torch.zeros(0)
    everyone = torch.cat([row["entropies"] for row in gather_rows(policy.accelerator, [{"entropies": mine}])])
    threshold = quantile(everyone, 1 - share) if len(everyone) else 0.0
    return [values.double() >= threshold for values in entropies]  # float32 would round the threshold
