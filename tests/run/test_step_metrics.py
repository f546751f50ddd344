"""Step metrics: means over what was measured, and none over nothing."""

from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator

from grpo.config.schema import Config, ObjectiveConfig
from grpo.experience import Sampled
from grpo.rewards.scoring import Scores
from grpo.run.state import Run
from grpo.run.step_metrics import OVER_TRAINED_TOKENS, step_metrics
from grpo.runtime.sums import Sums
from tests.fakes import group

LAPS = dict.fromkeys(("rollout", "reward", "reference", "update"), 1.0)


def metrics_of(sums: Sums, ended: bool = True, **objective: Any) -> dict[str, float]:
    rewards = torch.zeros(1, 2, dtype=torch.float64)
    sampled = Sampled([group(0, [5], [[6, 7], [8]], ended)], Scores(rewards, {"a": rewards}), [0])
    config = Config(objective=ObjectiveConfig(**objective))
    return step_metrics(config, Accelerator(cpu=True), sampled, torch.zeros(1, 2), sums, LAPS)


def test_a_step_that_trained_no_token_has_no_mean_over_tokens() -> None:
    """All groups are flat and the loss has no KL, so no completion goes through the model. 0 would read as measured."""
    row = metrics_of(Sums(), beta=0.0)
    assert not {"policy/entropy", "policy/clip_fraction", "policy/sampling_logprob_difference"} & row.keys()
    assert (row["policy/kl"], row["policy/loss"], row["policy/grad_norm"]) == (0, 0, 0)
    assert row["reward/zero_std_fraction"] == 1 and row["rollout/length_mean"] == 1.5
    assert row["rollout/tokens"] == 5  # the prompt of one token twice, and completions of two and one
    assert "policy/kl" not in metrics_of(Sums(), beta=0.1)  # all completions are masked: nothing was measured


def test_truncated_are_the_completions_without_an_end() -> None:
    assert metrics_of(Sums(), beta=0.0)["rollout/truncated_fraction"] == 0
    assert metrics_of(Sums(), ended=False, beta=0.0)["rollout/truncated_fraction"] == 1


def test_means_over_trained_tokens_by_hand() -> None:
    sums = Sums()
    for number, name in enumerate(OVER_TRAINED_TOKENS.values()):
        sums.add(name, 3.0 * number, 6)
    row = metrics_of(sums, beta=0.1)
    assert [row[key] for key in OVER_TRAINED_TOKENS] == [0.0, 0.5, 1.0, 1.5]


def test_beta_stays_in_a_step_without_a_kl() -> None:
    config = Config(objective=ObjectiveConfig(kl_target=0.1))
    run: Any = SimpleNamespace(config=config, beta=0.04)
    metrics: dict[str, float] = {}
    Run.adapt_beta(run, metrics)
    assert metrics == {"policy/beta": 0.04} and run.beta == 0.04
    Run.adapt_beta(run, {"policy/kl": 0.2})
    assert run.beta > 0.04


def test_beta_is_adapted_to_the_kl_of_a_token() -> None:
    """kl_target is compared with policy/kl, a mean over tokens; the completions of a step scale the change only."""
    config = Config(objective=ObjectiveConfig(kl_target=0.1, kl_horizon=640))  # 8 prompts x 8 completions
    run: Any = SimpleNamespace(config=config, beta=0.04)
    for kl, factor in ((0.11, 1.01), (0.09, 0.99)):
        run.beta = 0.04
        Run.adapt_beta(run, {"policy/kl": kl})
        assert abs(run.beta - 0.04 * factor) < 1e-12
