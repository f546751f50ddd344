"""KL to the reference policy: per-token estimates from sampled tokens, and a coefficient that follows a target.

What is differentiated matters more than what is estimated. For one token drawn from the policy, with
d = log reference - log policy, every estimator below has KL(policy || reference) as its mean (k2 nearly), but
its gradient, times grad log policy, is

    k1    1              mean 0: as a loss it does nothing on average
    k2    -d             right: the gradient of KL(policy || reference)
    k3    1 - exp(d)     that of KL(reference || policy), the other direction
    ratio * k1           1 - d     right on average
    ratio * k3           -d        right, token by token: at ratio 1 the same as k2

Hence `use_bias_correction_kl` (TRL's name; DeepSeek-V3.2, arXiv 2512.02556): the ratio pi / pi_old makes the mean of
the estimate the KL of the current policy, so that its gradient is that KL's gradient.
"""

import torch
from torch import Tensor

LIMIT = 20.0
"""Log-ratios are clamped to +-20 before exp, which would overflow."""


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimates of KL(policy || reference) from tokens drawn from the policy (Schulman, joschu.net/blog/kl-approx).

    with d = reference - logprobs:   k1 = -d     k2 = d^2 / 2     k3 = exp(d) - d - 1
    """
    difference = (reference - logprobs).clamp(-LIMIT, LIMIT)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference**2 / 2
    return torch.exp(difference) - difference - 1


def adapted_beta(beta: float, kl: float, target: float, completions: int, horizon: int) -> float:
    """beta * (1 + clip(kl / target - 1, -0.2, 0.2) * completions / horizon)   (Ziegler et al., arXiv 1909.08593, section 2.2).

    # kl twice the target, 64 completions, horizon 640: beta * (1 + 0.2 * 0.1) = beta * 1.02
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * completions / horizon)
