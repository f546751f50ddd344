"""Logprob mismatch: an engine's sampling logprobs compared with the trainer's logprobs of the same tokens.

Both must come from the same policy. Rounding causes a small difference. Another temperature, stale weights or a wrong
mask cause a large one. The difference is measured at the start of a run, and in every step as
policy/sampling_logprob_difference. For an engine with its own copy of the weights, the weight sync is verified at the
start. For such an engine and with LoRA, the difference is checked in every step.
"""

import torch
from torch import nn

from grpo.config.schema import Config
from grpo.errors import NumericsError
from grpo.models.architecture import vocabulary_size
from grpo.models.logprob_model import probe_batch
from grpo.packing import pack
from grpo.policy import Policy
from grpo.rollout.engine import RolloutEngine
from grpo.runtime.precision import precision_of
from grpo.types import Prompt, SamplingPlan

SAMPLES, TOKENS = 2, 8
LONG_PROMPT = 40
"""Tokens of a prompt that is long enough for an engine that caches prompts in blocks of 16."""


def check_agreement(engine: RolloutEngine, policy: Policy, temperature: float, allowed: float | None = None) -> float:
    """Sample a few tokens after a synthetic prompt and compare the logprobs. Collective if weights are sharded.

    Args:
        engine: the engine to check.
        policy: the trainer's policy.
        temperature: sampling temperature.
        allowed: largest mean absolute difference, in nats. None: that of the precision.

    Returns:
        The mean absolute difference, in nats.

    Raises:
        NumericsError: the difference exceeds the limit.
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
    """Return the mean absolute difference, in nats, for a synthetic prompt of `length` tokens.

    Collective if weights are sharded.
    """
    vocabulary = vocabulary_size(policy.model)
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
    """Return the mean difference, in nats, that rounding explains in the precision of `policy`."""
    return precision_of(policy.accelerator, policy.model.dtype).logprob


def verify_weight_sync(engine: RolloutEngine, policy: Policy, config: Config) -> None:
    """Check that the engine takes over changed weights, and then the original ones.

    A successful update call is not enough: the engine may keep a stale copy of one weight, for example of a tied head.
    Weights are doubled to amplify the effect of a stale one (float16 would overflow, so they are halved there). Below
    float32, rounding is amplified as well, so the tolerance is larger.

    Raises:
        NumericsError: the logprobs differ by more than the tolerance after one of the updates.
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
            f"ones, its logprobs differ from the trainer's by {found:.2g} on average (rounding explains {allowed:g}). "
            f"With vLLM: start the server with launch/vllm_server.py, or see docs/vllm.md for what is known to fail"
        )
    engine.update_weights(0)
    found = difference(engine, policy, config.sampling.temperature, LONG_PROMPT)
    if not found <= allowed:
        raise NumericsError(
            f"rollout.engine {config.rollout.engine} returned stale logprobs after the update: they differ from "
            f"the trainer's by {found:.2g} on average (rounding explains {allowed:g}). See docs/vllm.md"
        )


def scale(model: nn.Module, factor: float) -> None:
    """Multiply all weights by `factor` in place. A power of two is exact and can be undone exactly."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
                parameter.mul_(factor)


def check_difference(
    engine: RolloutEngine, policy: Policy, config: Config, step: int, found: float, *, first: bool = False
) -> None:
    """Check that the tokens of a step were sampled with the trainer's weights.

    Only an engine with its own copy of the weights can fail this, or one that samples from weights with a LoRA adapter
    merged in. An adapter starts at 0: after the first step, a few more tokens are sampled with the updated one.

    Args:
        engine: the engine that sampled.
        policy: the trainer's policy.
        config: the config.
        step: number of the step, for the message.
        found: policy/sampling_logprob_difference of the step, in nats.
        first: the step is the first one of this process. Collective if weights are sharded.

    Raises:
        NumericsError: the difference exceeds rollout.max_logprob_difference, or the tolerance of the precision if that
            is null.
    """
    rollout, merged = config.rollout, policy.adapter is not None and not engine.has_own_weights
    if not (engine.has_own_weights or merged) or (rollout.max_staleness and rollout.max_logprob_difference is None):
        return  # completions of an older policy differ by what it has learned since
    allowed = rollout.max_logprob_difference or tolerance_for(policy)
    if merged and first and not rollout.max_staleness and found <= allowed:
        found = difference(engine, policy, config.sampling.temperature)
    if found <= allowed:
        return
    measured = f"policy/sampling_logprob_difference is {found:.2g} in step {step} (rounding explains {allowed:g}): "
    if merged:
        raise NumericsError(
            f"{measured}rollout.engine {rollout.engine} samples from weights with the adapter merged in, as final/ "
            f"would hold them, and these do not compute what the model computes with the adapter beside its weights. "
            f"This step is not saved. Name fewer layers in lora.target_modules, for example q_proj, k_proj, v_proj, "
            f"o_proj, or set rollout.max_logprob_difference"
        )
    raise NumericsError(
        f"{measured}rollout.engine {rollout.engine} sampled with other weights than the trainer's. The weights here "
        f"are sound; see docs/vllm.md, or set rollout.max_logprob_difference"
    )
