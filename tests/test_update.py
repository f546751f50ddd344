"""One update: a real policy learns from given completions. Counts, ratios, steps and sums by hand."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from grpo.config.schema import Config, ModelConfig, ObjectiveConfig, OptimizerConfig, SamplingConfig
from grpo.errors import NumericsError
from grpo.experience import Experience, Packed
from grpo.losses import LOSSES, Counts, register_loss
from grpo.packing import pack
from grpo.policy import Policy
from grpo.runtime.sums import Sums
from grpo.runtime.timing import Clock
from grpo.trainer import MAX_SKIPPED, check_skipped, count_tokens, update
from grpo.types import Group
from tests.fakes import group, tiny_folder

ADVANTAGES = torch.tensor([[1.0, -0.5]], dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def completions(ended: bool = True) -> list[Group]:
    """Return one group: 3 and 1 tokens, with sampling logprobs of -1, which are not those of the policy."""
    return [group(0, [5, 6], [[7, 8, 9], [10]], ended)]


def run_of(folder: Path, learning_rate: float = 0.01, weight_decay: float = 0.0, **objective: Any) -> Any:
    settings = ObjectiveConfig(**{"beta": 0.0} | objective)
    config = Config(
        model=ModelConfig(name=str(folder)),
        objective=settings,
        optimizer=OptimizerConfig(learning_rate=learning_rate, weight_decay=weight_decay),
        sampling=SamplingConfig(num_generations=2, max_completion_length=8),
    )
    accelerator = Accelerator(cpu=True)
    parts = (config.model, config.objective, config.optimizer)
    policy = Policy(accelerator, str(folder), *parts, temperature=1.0, optimizer_steps=10)
    return SimpleNamespace(config=config, accelerator=accelerator, policy=policy, beta=settings.beta, run_dir=folder)


def learn(run: Any, groups: list[Group], advantages_PG: Tensor = ADVANTAGES, shift: float | None = None) -> Sums:
    """Update once. `shift`: the reference's logprobs are those of the policy minus this."""
    batches = pack(groups, advantages_PG, max_tokens=99, skip_flat=run.beta == 0)
    references: list[Tensor | None] | None = None
    if shift is not None:
        with torch.no_grad():
            references = [run.policy.logprobs(batch)[0] - shift for batch in batches]
    sums = Sums()
    update(run, Experience(groups, [Packed(batches, len(batches), references or [])], advantages_PG), sums, Clock())
    return sums


def weights(run: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.policy.model.named_parameters()}


def test_the_first_pass_is_on_policy_whatever_the_sampler_says(folder: Path) -> None:
    """All ratios are 1: the loss is minus the mean advantage of the 4 tokens, and nothing is clipped."""
    sums = learn(run_of(folder, epsilon=1e-6), completions())
    assert sums.total("loss") == pytest.approx(-(3 * 1.0 - 0.5) / 4, rel=1e-6)
    assert (sums.total("clipped"), sums.count("clipped")) == (0, 4)
    assert sums.mean("mismatch") > 0.1  # the sampler's -1 is another policy


def test_later_passes_are_off_policy_and_each_is_a_step(folder: Path) -> None:
    run = run_of(folder, num_iterations=3, learning_rate=0.05)
    sums = learn(run, completions())
    assert sums.count("grad_norm") == 3 == run.policy.scheduler.last_epoch
    assert sums.total("clipped") > 0 and sums.count("clipped") == 12
    assert sums.count("entropy") == sums.count("mismatch") == 4  # measured in the first pass only


def test_beta_is_the_adapted_one(folder: Path) -> None:
    """d = -1: k1 is 1 for each token. The KL term is run.beta times 1, not objective.beta."""
    run = run_of(folder, beta=0.04, kl_estimator="k1")
    run.beta = 0.5
    sums = learn(run, completions(), shift=1.0)
    assert sums.total("loss") == pytest.approx(-2.5 / 4 + 0.5, rel=1e-5)
    assert sums.mean("kl") == pytest.approx(1.0, rel=1e-5)


def test_counts_are_those_of_all_ranks_without_masked_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(accelerator: Accelerator, values: list[float]) -> list[float]:
        return [2 * value for value in values]  # a second rank with the same completions

    monkeypatch.setattr("grpo.trainer.sum_over_ranks", both)
    groups = completions() + completions(ended=False)
    for masked, counted in [(False, 2), (True, 1)]:
        objective = ObjectiveConfig(mask_truncated_completions=masked)
        config = Config(objective=objective, sampling=SamplingConfig(max_completion_length=8))
        run: Any = SimpleNamespace(config=config, accelerator=Accelerator(cpu=True))
        assert count_tokens(run, groups) == Counts(
            tokens=2 * 4 * counted, sequences=2 * 2 * counted, max_completion_length=8
        )


def test_flat_groups_move_only_the_learning_rate(folder: Path) -> None:
    run = run_of(folder, weight_decay=0.5)
    before = weights(run)
    sums = learn(run, completions(), torch.zeros(1, 2))
    assert all(torch.equal(before[name], value) for name, value in weights(run).items())
    assert sums.count("grad_norm") == 0 and run.policy.scheduler.last_epoch == 1
    learn(run, completions())
    assert run.policy.scheduler.last_epoch == 2


def test_a_loss_that_is_not_finite_is_not_stepped_on(folder: Path) -> None:
    @register_loss("test_infinite", per="token")
    def infinite(ratio: Tensor, advantages: Tensor) -> Tensor:
        return math.inf - ratio * advantages  # with a gradient that is finite

    try:
        run = run_of(folder, loss_type="test_infinite")
        before = weights(run)
        sums = learn(run, completions())
        assert all(torch.equal(before[name], value) for name, value in weights(run).items())
        assert sums.total("skipped") == 1 and run.policy.skipped_in_a_row == 1
    finally:
        del LOSSES._entries["test_infinite"], LOSSES._sources["test_infinite"]


def test_the_run_ends_at_the_third_skipped_step_in_a_row(tmp_path: Path) -> None:
    def skipped(count: int) -> Any:
        return SimpleNamespace(policy=SimpleNamespace(skipped_in_a_row=count), run_dir=tmp_path)

    check_skipped(skipped(MAX_SKIPPED - 1), 5)
    with pytest.raises(NumericsError, match="3 optimizer steps in a row"):
        check_skipped(skipped(MAX_SKIPPED), 5)
