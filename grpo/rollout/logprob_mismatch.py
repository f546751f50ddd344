"""Logprob mismatch: the sampling logprobs of an engine compared with the trainer's logprobs of the same tokens.

Both must be one policy. Rounding causes a small difference; another temperature, stale weights or a wrong mask a large
one. It is measured at the start of a run, and in every step as policy/sampling_logprob_difference. For an engine with
weights of its own, the weight sync is verified at the start, and the difference is checked in every step.
"""

import torch
from torch import nn

from grpo.config.schema import Config, RolloutConfig
from grpo.errors import NumericsError
from grpo.models.logprob_model import probe_batch
from grpo.packing import pack
from grpo.policy import Policy
from grpo.rollout.engine import RolloutEngine
from grpo.runtime.precision import precision_of
from grpo.types import Prompt, SamplingPlan

SAMPLES, TOKENS = 2, 8
LONG_PROMPT = 40
"""Tokens: long enough for an engine that caches prompts in blocks of 16."""


def check_agreement(engine: RolloutEngine, policy: Policy, temperature: float, allowed: float | None = None) -> float:
    """Sample a few tokens after a synthetic prompt and return the mean absolute difference of their logprobs, in nats.

    Collective where weights are sharded.

    Raises:
        NumericsError: It is more than rounding explains (or than `allowed`).
    """
    found = difference(engine, policy, temperature)
    tolerance = tolerance_for(policy) if allowed is None else allowed
    if not found <= tolerance:
        raise NumericsError(
            f"the engine and the trainer disagree: the logprobs of the same tokens differ by {found:.2g} "
            f"nats on average, where rounding explains {tolerance}. The engine does not sample from the policy that is "
            f"trained: set rollout.engine to transformers to see whether it is the engine"
        )
    return found


def difference(engine: RolloutEngine, policy: Policy, temperature: float, length: int = 5) -> float:
    """Return the mean absolute difference in nats for a synthetic prompt of `length` tokens. Collective if sharded."""
    vocabulary = policy.model.config.vocab_size
    probe = probe_batch(vocabulary).input_ids_T[:5].tolist()
    prompt_ids = tuple(probe + [(5 * i + 2) % vocabulary for i in range(length - len(probe))])
    plan = SamplingPlan(SAMPLES, TOKENS, temperature, seed=0)
    with policy.accelerator.autocast():
        groups = engine.generate([Prompt(0, "", prompt_ids)], plan)
    [batch] = pack(groups, torch.zeros(1, SAMPLES), max_tokens=len(prompt_ids) + SAMPLES * TOKENS)
    batch = batch.to(policy.device)
    with torch.no_grad():
        logprobs = policy.logprobs(batch)[0]
    return float((logprobs - batch.sampling_logprobs_N).abs().mean())


def tolerance_for(policy: Policy) -> float:
    return precision_of(policy.accelerator, policy.model.dtype).logprob


def verify_weight_sync(engine: RolloutEngine, policy: Policy, config: Config) -> None:
    """Raise NumericsError unless the engine takes over changed weights, and the original ones again.

    An update call that returns proves nothing: the engine may hold a stale copy of one weight (of a tied head, say).
    Doubled weights amplify the effect of a stale one (float16 would overflow: there they are halved). Below float32,
    rounding is amplified too, so the tolerance is larger.
    """
    precision = precision_of(policy.accelerator)
    allowed = config.rollout.max_logprob_difference or tolerance_for(policy)
    allowed *= precision.sync_factor
    factor = precision.sync_scale
    scale(policy.model, factor)
    policy.refresh_sampler()
    try:
        engine.update_weights(0)
        found = difference(engine, policy, config.sampling.temperature, LONG_PROMPT)
    finally:
        scale(policy.model, 1 / factor)
        policy.refresh_sampler()
    if not found <= allowed:
        raise NumericsError(
            f"rollout.engine {config.rollout.engine} did not take over all new weights: after an update with changed "
            f"ones, its logprobs differ from the trainer's by {found:.2g} on average (rounding explains "
            f"{allowed:g}). With vLLM: start the server with launch/vllm_server.py, or see docs/vllm.md for what is "
            "known to fail"
        )
    engine.update_weights(0)
    found = difference(engine, policy, config.sampling.temperature, LONG_PROMPT)
    if not found <= allowed:
        raise NumericsError(
            f"rollout.engine {config.rollout.engine} returned stale logprobs after the update: they differ from "
            f"the trainer's by {found:.2g} on average (rounding explains {allowed:g}). See docs/vllm.md"
        )


def scale(model: nn.Module, factor: float) -> None:
    """Multiply all weights in place. A power of two is exact and can be undone exactly."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
                parameter.mul_(factor)


def check_difference(engine: RolloutEngine, policy: Policy, config: RolloutConfig, step: int, found: float) -> None:
    """Raise NumericsError if the tokens of this step were sampled with other weights than the trainer's.

    Only an engine with weights of its own can do that. `found`: policy/sampling_logprob_difference of the step.
    """
    if not engine.has_own_weights:
        return
    allowed = config.max_logprob_difference or tolerance_for(policy)
    if not found <= allowed:
        raise NumericsError(
            f"policy/sampling_logprob_difference is {found:.2g} in step {step} (rounding explains {allowed:g}): "
            f"rollout.engine {config.engine} sampled with other weights than the trainer's. The weights here are "
            "sound; see docs/vllm.md, or set rollout.max_logprob_difference"
        )
