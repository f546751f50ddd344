"""Mini-batches: optimizer steps on disjoint parts of one set of completions, against an oracle in plain torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from grpo.config.schema import Config, ObjectiveConfig
from grpo.experience import Experience, ExperienceCollector
from grpo.packing import PackedBatch
from grpo.runtime.sums import Sums
from grpo.runtime.timing import Clock
from grpo.trainer import count_tokens, update
from grpo.types import Group
from tests.fakes import group, tiny_folder
from tests.test_update import run_of, weights

RATE = 1.0  # SGD: large enough for the ratios to leave the clip range
ADVANTAGES = torch.tensor([[1.0, -0.5], [0.5, -1.5], [-0.7, 0.4]], dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def groups() -> list[Group]:
    """Return three groups of two completions: 4, 7 and 3 tokens."""
    tokens = [[[7, 8, 9], [10]], [[12, 13], [14, 15, 16, 17, 18]], [[19], [20, 21]]]
    return [group(draw, [5, 6 + draw], completions) for draw, completions in enumerate(tokens)]


def collector_of(run: Any, tokens_per_batch: int = 99) -> ExperienceCollector:
    engine = type("E", (), {"state_dict": dict})
    unused: Any = type("Engine", (), {"engine": engine, "give_up_memory": staticmethod(lambda: False)})
    parts = (run.config, run.accelerator, run.policy, unused)
    return ExperienceCollector(*parts, unused, unused, tokens_per_batch=tokens_per_batch)


def learner(folder: Path, mini_batches: int, rate: float = RATE, tokens_per_batch: int = 99, **objective: Any) -> Any:
    """Return a run that records the gradient before each of its SGD steps in `gradients`."""
    run = run_of(folder, mini_batches=mini_batches, **objective)
    run.collector = collector_of(run, tokens_per_batch)
    run.policy.strategy.prepared_optimizer = torch.optim.SGD(run.policy.model.parameters(), lr=rate)
    run.gradients = []
    step = run.policy.step

    def watched(usable: bool = True) -> float:
        run.gradients.append({name: p.grad.clone() for name, p in run.policy.model.named_parameters()})
        return float(step(usable))

    run.policy.step = watched
    run.policy.strategy.max_grad_norm = 1e9
    return run


def learn(run: Any, made: list[Group] | None = None) -> Sums:
    made, sums = made or groups(), Sums()
    packed = run.collector._pack(made, ADVANTAGES[: len(made)])
    update(run, Experience(made, packed, ADVANTAGES, ADVANTAGES[: len(made)]), sums, Clock())
    return sums


def oracle(folder: Path, parts: list[list[tuple[int, int]]], passes: int, divisor: float) -> tuple[Any, list[float]]:
    """Take SGD steps on the parts, each a list of (group, completion), one completion at a time.

    Returns:
        The model, and the loss of each step.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logprobs(p: int, s: int) -> Tensor:
        prompt, ids = list(groups()[p].prompt.token_ids), groups()[p].completions[s].token_ids
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]

    old = {(p, s): logprobs(p, s).detach() for part in parts for p, s in part}
    losses = []
    for _ in range(passes):
        for part in parts:
            loss = torch.zeros(())
            for p, s in part:
                ratio, advantage = (logprobs(p, s) - old[p, s]).exp(), float(ADVANTAGES[p, s])
                loss = loss - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum() / divisor
            model.zero_grad()
            loss.backward()
            losses.append(float(loss))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= RATE * parameter.grad
    return model, losses


@pytest.mark.parametrize(
    ("count", "parts"),
    [
        (2, [[(0, 0), (0, 1), (1, 0)], [(1, 1), (2, 0), (2, 1)]]),  # the second group is cut
        (3, [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(2, 0), (2, 1)]]),
    ],
)
@pytest.mark.parametrize("passes", [1, 2])
def test_the_steps_are_those_of_the_oracle(
    folder: Path, count: int, parts: list[list[tuple[int, int]]], passes: int
) -> None:
    """Each of the parts divides by a share of all 14 tokens; old logprobs are those before the first step."""
    run = learner(folder, count, num_iterations=passes)
    start = {name: weight.clone() for name, weight in weights(run).items()}
    sums = learn(run)
    model, losses = oracle(folder, parts, passes, divisor=14 / count)
    assert sums.count("grad_norm") == count * passes == run.policy.scheduler.last_epoch
    assert sums.total("loss") == pytest.approx(sum(losses), rel=1e-5)
    assert sums.count("clipped") == 14 * passes
    assert sums.total("clipped") > 0 or passes == 1
    assert sums.count("entropy") == sums.count("mismatch") == 14  # each token once: in the first pass
    for name, expected in model.named_parameters():
        error, change = weights(run)[name] - expected, expected - start[name]
        assert float(error.norm()) <= 1e-5 * count * passes * float(change.norm()), name  # 1e-5 for each step


def test_logprobs_differ_from_the_samplers_by_what_they_did_before_the_first_step(folder: Path) -> None:
    one, three = (learner(folder, count) for count in (1, 3))
    assert learn(three).mean("mismatch") == pytest.approx(learn(one).mean("mismatch"), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_the_mean_of_the_gradients_is_that_of_a_single_mini_batch(folder: Path, loss_type: str) -> None:
    """At a learning rate of 0 the policy stays: the mini-batches cut one objective into parts of equal weight."""
    whole, cut = (learner(folder, count, rate=0.0, loss_type=loss_type) for count in (1, 3))
    for run in (whole, cut):
        learn(run)
    assert len(whole.gradients) == 1 and len(cut.gradients) == 3
    for name, gradient in whole.gradients[0].items():
        assert torch.allclose(sum(part[name] for part in cut.gradients) / 3, gradient, atol=1e-6), name


def test_completions_are_cut_in_the_order_of_draws(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(folder, mini_batches=2)
    made = [groups()[2], groups()[0], groups()[1]]
    assert collector_of(run)._mini_batch_of(made).tolist() == [[1, 1], [0, 0], [0, 1]]
    assert collector_of(run)._mini_batch_of([]).shape == (0, 1)
    everyone = [{"draw": draw} for draw in (0, 2, 1, 3)]  # of two ranks
    monkeypatch.setattr("grpo.experience.gather_rows", lambda accelerator, rows: everyone)
    assert collector_of(run)._mini_batch_of([groups()[0], groups()[2]]).tolist() == [[0, 0], [1, 1]]
    assert collector_of(run)._mini_batch_of([groups()[0], groups()[1]]).tolist() == [[0, 0], [0, 0]]


def test_a_mini_batch_without_a_gradient_is_no_step(folder: Path) -> None:
    """The first of two groups is flat. The other one is trained as it would be alone, with half of all 11 tokens."""
    run = learner(folder, 2)
    before = weights(run)
    advantages = torch.tensor([[0.0, 0.0], [0.5, -1.5]], dtype=torch.float64)
    packed = run.collector._pack(groups()[:2], advantages)
    assert [len(part.batches) for part in packed] == [0, 1]
    sums = Sums()
    update(run, Experience(groups()[:2], packed, advantages, advantages), sums, Clock())
    assert sums.count("grad_norm") == 1 and run.policy.scheduler.last_epoch == 2
    assert sums.total("loss") == pytest.approx(-(2 * 0.5 - 5 * 1.5) / (11 / 2), rel=1e-5)  # on-policy
    assert any(not torch.equal(before[name], value) for name, value in weights(run).items())


def test_counts_are_a_share_of_the_step(folder: Path) -> None:
    run = run_of(folder, mini_batches=3)
    counts = count_tokens(run, groups())
    assert (counts.tokens, counts.sequences) == (pytest.approx(14 / 3), pytest.approx(2))
    config = Config(steps=4, objective=ObjectiveConfig(num_iterations=2, mini_batches=3))
    assert config.optimizer_steps == 24


def test_memory_may_run_out_in_a_later_mini_batch(folder: Path) -> None:
    """After the first step the old logprobs cannot be computed again: those that are known are laid out again."""
    expected, ours = learner(folder, 3, num_iterations=2), learner(folder, 3, num_iterations=2, tokens_per_batch=16)
    learn(expected)
    logprobs, calls = ours.policy.logprobs, 0

    def limited(batch: PackedBatch) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the second mini-batch, which has one batch of 2 + 2 + 5 tokens
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return logprobs(batch)

    ours.policy.logprobs = limited
    learn(ours)
    assert ours.collector.tokens_per_batch == 8 and calls > 6 + 1
    for name, weight in weights(expected).items():
        assert torch.allclose(weight, weights(ours)[name], atol=1e-5), name


@pytest.mark.parametrize("tokens_per_batch", [99, 8])
def test_only_the_tokens_of_high_entropy_have_a_policy_gradient(tmp_path: Path, tokens_per_batch: int) -> None:
    """Of each half of the completions, the third of the tokens with the highest entropy; all tokens are counted."""
    folder = tiny_folder(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # entropies of about 3.7 that differ by rounding are no test
    model.save_pretrained(folder)
    run = learner(folder, 2, rate=0.0, top_entropy_quantile=1 / 3, tokens_per_batch=tokens_per_batch)
    learn(run)
    parts = [[(0, 0), (0, 1), (1, 0)], [(1, 1), (2, 0), (2, 1)]]
    for part, gradients in zip(parts, run.gradients, strict=True):
        logprobs, entropies, advantages = [], [], []
        for p, s in part:
            prompt, ids = list(groups()[p].prompt.token_ids), groups()[p].completions[s].token_ids
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logprobs.append(logits[torch.arange(len(ids)), torch.tensor(ids)])
            entropies.append(-(logits.exp() * logits).sum(-1).detach())
            advantages.append(torch.full((len(ids),), float(ADVANTAGES[p, s])))
        entropy = torch.cat(entropies)
        kept = entropy >= torch.quantile(entropy, 2 / 3)
        assert 0 < kept.sum() < len(kept) / 2
        model.zero_grad()
        (-(torch.cat(logprobs) * torch.cat(advantages) * kept).sum() / 7).backward()
        for name, parameter in model.named_parameters():
            assert torch.allclose(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4), name
