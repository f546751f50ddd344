"""Agreement: what an engine says that it drew its tokens with, against what training makes of the same tokens.

The two must be one policy. Rounding keeps them a little apart; another temperature, stale weights or a wrong mask, far.
Measured at the start of a run, and again in every step as policy/sampling_logprob_difference. An engine that has weights of
its own must prove at the start that it takes over new ones, and is held to that difference in every step.
"""

import torch
from torch import nn

from grpo.config.schema import Config, RolloutConfig
from grpo.errors import NumericsError
from grpo.models.logprob_model import probe_batch
from grpo.packing import pack
from grpo.policy import Policy
from grpo.rollout.engine import RolloutEngine, is_separate
from grpo.runtime.precision import precision_of
from grpo.types import Prompt, SamplingPlan

SAMPLES, TOKENS = 2, 8
LONG_PROMPT = 40
"""Tokens: long enough for an engine that caches prompts in blocks of 16."""


def check_agreement(engine: RolloutEngine, policy: Policy, temperature: float, allowed: float | None = None) -> float:
    """Samples a few tokens after a made-up prompt; -> the mean absolute difference of their logprobs.

    Raises NumericsError if it is more than rounding. Collective where weights are sharded.
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
    """Mean absolute difference of the logprobs of a few tokens after a made-up prompt. Collective where weights are sharded."""
    vocabulary = policy.model.config.vocab_size
    probe = probe_batch(vocabulary).input_ids_T[:5].tolist()
    made_up = tuple(probe + [(5 * i + 2) % vocabulary for i in range(length - len(probe))])
    plan = SamplingPlan(SAMPLES, TOKENS, temperature, seed=0)
    with policy.accelerator.autocast():
        groups = engine.generate([Prompt(0, "", made_up)], plan)
    [batch] = pack(groups, torch.zeros(1, SAMPLES), max_tokens=len(made_up) + SAMPLES * TOKENS)
    batch = batch.to(policy.device)
    with torch.no_grad():
        logprobs = policy.logprobs(batch)[0]
    return float((logprobs - batch.sampling_logprobs_N).abs().mean())


def tolerance_for(policy: Policy) -> float:
    return precision_of(policy.accelerator, policy.model.dtype).logprob


def verify_weight_sync(engine: RolloutEngine, policy: Policy, config: Config) -> None:
    """Raises NumericsError unless the engine follows the policy to quite other weights, and back. An update that says that
    it worked proves nothing: a copy of one weight that it forgot (of a tied head, for example) would go on sampling.

    Doubled weights make everything in a model louder, so what was forgotten stands out; float16 has no room for that. With
    less precision than float32, rounding is louder too.
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
            f"rollout.engine {config.rollout.engine} did not take over all new weights: after an update with changed ones, its "
            f"logprobs differ from the trainer's by {found:.2g} on average (rounding explains {allowed:g}). "
            f"With vLLM: start the server with launch/vllm_server.py, or see docs/vllm.md for what is known to fail"
        )
    engine.update_weights(0)
    found = difference(engine, policy, config.sampling.temperature, LONG_PROMPT)
    if not found <= allowed:
        raise NumericsError(
            f"rollout.engine {config.rollout.engine} remembers something of old weights: after an update its logprobs differ from "
            f"the trainer's by {found:.2g} on average (rounding explains {allowed:g}). See docs/vllm.md"
        )


def scale(model: nn.Module, factor: float) -> None:
    """Multiply all weights in place. A power of two is exact, and so is undoing it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
                parameter.mul_(factor)


def check_difference(engine: RolloutEngine, policy: Policy, config: RolloutConfig, step: int, found: float) -> None:
    """Raises NumericsError if the tokens of this step came from other weights than the trainer's. Only engines that have
    weights of their own can do that. `found`: policy/sampling_logprob_difference of the step."""
    if not is_separate(engine):
        return
    allowed = config.max_logprob_difference or tolerance_for(policy)
    if not found <= allowed:
        raise NumericsError(
            f"policy/sampling_logprob_difference is {found:.2g} in step {step} (rounding explains {allowed:g}): rollout.engine "
            f"{config.engine} sampled with other weights than the trainer's. The weights here are sound; see "
            f"docs/vllm.md, or set rollout.max_logprob_difference"
        )
