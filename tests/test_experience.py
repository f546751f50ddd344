"""Experience of given completions: which groups stay, penalties, subsets, packing. Policy and rewards are real."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from grpo.config.schema import Config, ModelConfig, ObjectiveConfig, OptimizerConfig, SamplingConfig
from grpo.data.stream import PromptStream
from grpo.experience import ExperienceCollector, Sampled, estimator_of
from grpo.kl import kl_estimate
from grpo.packing import pack
from grpo.policy import Policy
from grpo.rewards.scoring import RewardSum, Scores
from grpo.rollout.async_sampler import SampledBatch
from grpo.runtime.sums import Sums
from grpo.runtime.timing import Clock
from grpo.types import Completion, Group, Prompt
from tests.fakes import group, tiny_folder

REWARD = "tests.letters:count_letters"  # the share of "a" and "b" in 8 letters


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = str(tiny_folder(tmp_path_factory.mktemp("model")))
    parts = (ModelConfig(name=folder), ObjectiveConfig(beta=0.04), OptimizerConfig())
    return Policy(Accelerator(cpu=True), folder, *parts, temperature=1.0, optimizer_steps=1)


def collector(policy: Policy, texts: Callable[[int], list[str]], **sections: Any) -> ExperienceCollector:
    """Return a collector whose engine completes the prompt of draw d with texts(d)."""
    config = Config(prompts_per_step=2, **sections)

    def complete(prompt: Prompt) -> Group:
        made = [Completion([7] * max(1, len(t)), [-1.0] * max(1, len(t)), True, t) for t in texts(prompt.draw)]
        return Group(prompt, made)

    def next_batch(draw_prompts: Callable[[], list[Prompt]], version: int) -> SampledBatch:
        return SampledBatch([complete(prompt) for prompt in draw_prompts()], 0.0, version)

    sampler: Any = SimpleNamespace(next_batch=next_batch)
    prompts = PromptStream([Prompt(0, [{"role": "user", "content": "question"}], (5, 6))], seed=0)
    return ExperienceCollector(config, policy.accelerator, policy, sampler, prompts, RewardSum({REWARD: 1.0}))


def sample(made: ExperienceCollector) -> Sampled:
    return made.sample(1, Clock())


def dynamic(oversample: float = 1.0, rounds: int = 4) -> dict[str, Any]:
    beside = {"dynamic_sampling": True, "oversample": oversample, "max_sampling_rounds": rounds}
    return {"sampling": SamplingConfig(num_generations=2, max_completion_length=8, **beside)}


def kept(sampled: Sampled) -> list[int]:
    return [sampled.groups[row].prompt.draw for row in sampled.kept]


def test_dynamic_sampling_draws_until_enough_groups_differ(policy: Policy) -> None:
    """Every second prompt has a flat group: draws 0 1 | 2 | 3, of which 1 and 3 are kept."""
    made = collector(policy, lambda draw: ["a", "x"] if draw % 2 else ["x", "x"], **dynamic())
    sampled = sample(made)
    assert (kept(sampled), sampled.rounds, made.prompts_drawn) == ([1, 3], 3, 4)


def test_dynamic_sampling_keeps_no_more_than_a_step_and_those_drawn_first(policy: Policy) -> None:
    made = collector(policy, lambda draw: ["a", "x"], **dynamic(oversample=2.0))
    sampled = sample(made)
    assert (kept(sampled), sampled.rounds, made.prompts_drawn) == ([0, 1], 1, 4)


def test_dynamic_sampling_stops_at_its_cap(policy: Policy) -> None:
    made = collector(policy, lambda draw: ["x", "x"], **dynamic(rounds=2))
    sampled = sample(made)
    assert (kept(sampled), sampled.rounds, made.prompts_drawn) == ([], 2, 4)


def test_without_dynamic_sampling_flat_groups_stay(policy: Policy) -> None:
    made = collector(policy, lambda draw: ["x", "x"], sampling=SamplingConfig(num_generations=2))
    assert (kept(sample(made)), made.prompts_drawn) == ([0, 1], 2)


def test_the_overlong_penalty_costs_reward(policy: Policy) -> None:
    """max 8, cache 4: 6 tokens cost 0.5, 8 tokens 1."""
    sampling = SamplingConfig(num_generations=2, max_completion_length=8)
    objective = ObjectiveConfig(soft_overlong_cache=4)
    sampled = sample(collector(policy, lambda draw: ["a" * 6, "a" * 8], sampling=sampling, objective=objective))
    assert sampled.scores.rewards_PG.tolist() == [[6 / 8 - 0.5, 1.0 - 1.0]] * 2


def scored(rewards: list[list[float]], groups: list[Group]) -> Sampled:
    rewards_PG = torch.tensor(rewards, dtype=torch.float64)
    return Sampled(groups, Scores(rewards_PG, {REWARD: rewards_PG}), list(range(len(groups))))


def test_a_subset_is_trained_and_the_others_have_no_advantage(policy: Policy) -> None:
    """Rewards 0 1 1 1, of which three: the 0 and two of the others. Their mean is 2/3."""
    objective = ObjectiveConfig(subset="max_variance", subset_size=3, scale_rewards="none", beta=0.0)
    made = collector(policy, lambda draw: [], objective=objective)
    groups = [group(0, [5], [[7], [8], [9], [10]])]
    experience = made.compute_advantages(scored([[0.0, 1.0, 1.0, 1.0]], groups), 0.0, Sums())
    assert len(experience.groups[0].completions) == 3
    assert sorted(experience.all_advantages_PG[0].tolist()) == pytest.approx([-2 / 3, 0, 1 / 3, 1 / 3])


def test_the_kl_of_a_whole_completion_is_taken_off_its_reward(policy: Policy) -> None:
    """Rewards are equal, so that the advantages are those of -beta * KL, summed over 3 tokens and over 1."""
    objective = ObjectiveConfig(kl_in_reward=True, kl_estimator="k1", scale_rewards="none", beta=0.5)
    groups = [group(0, [5, 6], [[7, 8, 9], [10]])]
    [reference] = policy.reference_logprobs(pack(groups, max_tokens=99))
    assert reference is not None
    kl = kl_estimate(torch.full((4,), -1.0), reference, "k1")
    summed = torch.stack([kl[:3].sum(), kl[3]]).double()
    sums = Sums()
    made = collector(policy, lambda draw: [], objective=objective)
    experience = made.compute_advantages(scored([[1.0, 1.0]], groups), 0.5, sums)
    expected = -0.5 * (summed - summed.mean())
    assert torch.allclose(experience.all_advantages_PG[0], expected, atol=1e-5) and expected.abs().max() > 0.1
    assert sums.mean("kl") == pytest.approx(float(kl.mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "tokens"), [({"beta": 0.0}, 1), ({"beta": 0.1}, 4), ({"beta": 0.0, "entropy_coef": 0.1}, 4)]
)
def test_completions_without_advantage_are_computed_where_they_have_a_gradient(
    policy: Policy, settings: dict[str, float], tokens: int
) -> None:
    made = collector(policy, lambda draw: [], objective=ObjectiveConfig(**settings))
    [packed] = made._pack([group(0, [5], [[7, 8, 9], [10]])], torch.tensor([[0.0, 1.0]]))
    assert len(packed.batches[0].tokens_N) == tokens


def test_the_estimator_is_the_configs_own_or_that_of_the_loss() -> None:
    for settings, name in [
        ({}, "group"),
        ({"advantage_estimator": "rloo"}, "rloo"),
        ({"loss_type": "rloo"}, "rloo"),
        ({"loss_type": "rloo", "advantage_estimator": "group"}, "group"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "gdpo"),
    ]:
        assert estimator_of(ObjectiveConfig(**settings)) == name
