"""Agreement: what an engine says that it drew its tokens with, against what training makes of the same tokens.

The two must be one policy. Rounding keeps them a little apart; another temperature, stale weights or a wrong mask, far.
Measured at the start of a run, and again in every step as policy/sampling_logprob_difference.
"""

import torch

from grpo.distributed import compute_dtype
from grpo.errors import NumericsError
from grpo.packing import pack
from grpo.policy import Policy, probe_batch
from grpo.rollout import RolloutEngine
from grpo.types import Prompt, SamplingPlan

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest mean difference per token, in nats, that rounding explains, by the dtype that layers compute in."""
SAMPLES, TOKENS = 2, 8


def check_agreement(engine: RolloutEngine, policy: Policy, temperature: float) -> float:
    """Samples a few tokens after a made-up prompt; -> the mean absolute difference of their logprobs.

    Raises NumericsError if it is more than rounding. Collective where weights are sharded.
    """
    made_up = tuple(probe_batch(policy.model.config.vocab_size).input_ids_T[:5].tolist())
    plan = SamplingPlan(SAMPLES, TOKENS, temperature, seed=0)
    with policy.accelerator.autocast():
        groups = engine.generate([Prompt(0, "", made_up)], plan)
    [batch] = pack(groups, torch.zeros(1, SAMPLES), max_tokens=len(made_up) + SAMPLES * TOKENS)
    batch = batch.to(policy.device)
    with torch.no_grad():
        logprobs = policy.logprobs(batch)[0]
    difference = float((logprobs - batch.sampling_logprobs_N).abs().mean())
    dtype = compute_dtype(policy.accelerator) or policy.model.dtype
    tolerance = TOLERANCE[dtype]
    if not difference <= tolerance:
        raise NumericsError(
            f"the engine and the trainer disagree: the logprobs of the same {len(logprobs)} tokens differ by {difference:.2g} "
            f"nats on average, where rounding explains {tolerance}. The engine does not sample from the policy that is "
            f"trained: set rollout.engine to transformers to see whether it is the engine"
        )
    return difference
