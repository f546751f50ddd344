"""Losses whose gradient decays smoothly where PPO clips: SAPO and VESPO."""

import math

import torch
from torch import Tensor

from grpo.losses import MAX_LOG_RATIO, register_loss


@register_loss("sapo", per="sequence")
def sapo(ratio: Tensor, advantages: Tensor, *, sapo_temperature_pos: float, sapo_temperature_neg: float) -> Tensor:
    """-sigmoid(tau * (ratio - 1)) * 4 / tau * A, with tau by the sign of A      (SAPO, arXiv 2511.20347)."""
    tau = torch.where(advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


@register_loss("vespo", per="token")
def vespo(
    sequence_log_ratio: Tensor,
    sequence_log_correction: Tensor,
    advantages: Tensor,
    logprobs: Tensor,
    *,
    vespo_k_pos: float,
    vespo_lambda_pos: float,
    vespo_k_neg: float,
    vespo_lambda_neg: float,
) -> Tensor:
    """-phi(w).detach() * A * logp, log phi = lambda + k * log w - lambda * w      (VESPO, arXiv 2602.10693).

    w is the ratio of the whole completion, from the policy that sampled it to the policy that is trained: the
    correction for another sampler is a part of w, and phi bounds both. phi is 1 at w = 1 and decays on both sides.
    """
    log_w = (sequence_log_ratio + sequence_log_correction).detach().clamp(math.log(1e-8), MAX_LOG_RATIO)
    k = torch.where(advantages >= 0, vespo_k_pos, vespo_k_neg)
    lam = torch.where(advantages >= 0, vespo_lambda_pos, vespo_lambda_neg).clamp(min=1e-4)
    return -torch.exp(lam + k * log_w - lam * log_w.exp()) * advantages * logprobs
