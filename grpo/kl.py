"""KL to the reference policy: per-token estimates from sampled tokens, and a coefficient that follows a target.

The gradient of an estimate matters more than its value. For one token drawn from the policy, with
d = log reference - log policy, every estimator below has KL(policy || reference) as its mean (k2 nearly), but
its gradient, times grad log policy, is

    k1    1              mean 0: as a loss it does nothing on average
    k2    -d             the gradient of KL(policy || reference), as wanted
    k3    1 - exp(d)     that of KL(reference || policy), the other direction
    ratio * k1           1 - d     the gradient of KL(policy || reference) on average
    ratio * k3           -d        the same, token by token: at ratio 1 equal to k2

Hence `use_bias_correction_kl` (TRL's name; DeepSeek-V3.2, arXiv 2512.02556): the ratio pi / pi_old makes the mean of
the estimate the KL of the current policy, so that its gradient is that KL's gradient.

A new estimator is a function of the log-ratio d, which has no bounds (exp overflows above 88 in float32):

    @register_kl("absolute")
    def absolute(log_ratio):
        return log_ratio.abs()
"""

from collections.abc import Callable

import torch
from torch import Tensor

from grpo.registry import Registry

MAX_LOG_RATIO = 20.0
"""k3 is constant above d = 20, where exp grows without bounds. Such a token is e^20 times as likely under the
reference, and the policy practically never draws it. There is no lower bound: exp(d) goes to 0, and the gradient of k3
to 1."""

KL_ESTIMATORS: Registry[Callable[[Tensor], Tensor]] = Registry(
    "KL estimator", "grpo.objectives", key="objective.kl_estimator"
)
register_kl = KL_ESTIMATORS.register


@register_kl("k1")
def k1(log_ratio: Tensor) -> Tensor:
    """-d"""
    return -log_ratio


@register_kl("k2")
def k2(log_ratio: Tensor) -> Tensor:
    """d^2 / 2"""
    return log_ratio**2 / 2


@register_kl("k3")
def k3(log_ratio: Tensor) -> Tensor:
    """exp(d) - d - 1"""
    bounded = log_ratio.clamp(max=MAX_LOG_RATIO)
    return torch.exp(bounded) - bounded - 1


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate KL(policy || reference) per token, from tokens drawn from the policy (joschu.net/blog/kl-approx).

    Args:
        logprobs: [N] under the policy.
        reference: [N] logprobs of the same tokens under the reference policy.
        estimator: a registered name, or the path of your own function.
    """
    return KL_ESTIMATORS.get(estimator)(reference - logprobs)


def adapted_beta(beta: float, kl: float, target: float, completions: int, horizon: int) -> float:
    """Move beta so that the KL comes nearer to its target (Ziegler et al., arXiv 1909.08593, section 2.2).

    beta * (1 + clip(kl / target - 1, -0.2, 0.2) * completions / horizon)

    # kl twice the target, 64 completions, horizon 640: beta * (1 + 0.2 * 0.1) = beta * 1.02
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * completions / horizon)
