"""Load balancing of experts: loss and gradients are transformers' on plain rows, for any packing; the load by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from grpo.config.schema import Config, LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, SamplingConfig
from grpo.errors import ConfigError
from grpo.experience import Experience, ExperienceCollector, Packed
from grpo.models.routers import LoadBalance, RouterSums, load_metrics, padded_row_counts, row_counts
from grpo.packing import PackedBatch, pack
from grpo.policy import Policy
from grpo.runtime.sums import Sums
from grpo.runtime.timing import Clock
from grpo.trainer import update
from grpo.types import Group
from tests.fakes import group
from tests.models.test_families import LENGTHS, gradients, own_model
from tests.models.zoo import zoo_folder

COEFFICIENT = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_folder("qwen3_moe", tmp_path_factory.mktemp("moe"))


def groups_of() -> list[Group]:
    """Two groups of uneven lengths. The second completion of each was cut off."""
    torch.manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(2, 40, (length,)).tolist()

    groups = [group(draw, ids(prompt), [ids(n) for n in lengths]) for draw, (prompt, lengths) in enumerate(LENGTHS)]
    for made in groups:
        made.completions[1] = replace(made.completions[1], ended=False)
    return groups


def policy_of(
    folder: Path, coefficient: float | None = COEFFICIENT, lora: LoraConfig | None = None, **model: Any
) -> Policy:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Policy(
        Accelerator(cpu=True),
        str(folder),
        ModelConfig(name=str(folder), **model),
        ObjectiveConfig(beta=0.0, router_aux_loss_coef=coefficient),
        OptimizerConfig(learning_rate=0.01),
        lora,
        temperature=1.0,
        optimizer_steps=10,
    )


def expected(folder: Path, groups: list[Group], *, mask_truncated: bool = False) -> tuple[float, Tensor]:
    """transformers' auxiliary loss of padded rows, each prompt repeated for each completion, and its gradient."""
    model = own_model(folder)
    rows = [
        [*made.prompt.token_ids, *completion.token_ids]
        for made in groups
        for completion in made.completions
        if completion.ended or not mask_truncated
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    loss = model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True).aux_loss
    return float(loss.detach()), gradients(model, COEFFICIENT * loss)


def found(policy: Policy, batches: list[PackedBatch]) -> tuple[float, Tensor]:
    """The loss of the metrics, and the gradient summed over the batches."""
    policy.count_expert_load(batches)
    for batch in batches:
        policy.logprobs(batch)
        loss: Any = policy.router_loss()
        policy.backward(loss)
    metrics = policy.expert_metrics()
    zero = torch.zeros((), requires_grad=True)
    return metrics["policy/router_aux_loss"], gradients(policy.model, zero * 1)


def assert_equal(got: tuple[float, Tensor], want: tuple[float, Tensor]) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    assert float((got[1] - want[1]).norm() / want[1].norm()) < 1e-5


@pytest.mark.parametrize("max_tokens", [1000, 40, 25])
def test_loss_and_gradient_are_those_of_plain_rows_for_any_packing(folder: Path, max_tokens: int) -> None:
    policy = policy_of(folder)
    batches = pack(groups_of(), max_tokens=max_tokens, share_prompts=policy.shares_prompts)
    assert len(batches) == {1000: 1, 40: 2, 25: 3}[max_tokens]
    assert any(span.split for batch in batches for span in batch.spans) == (max_tokens == 25)
    assert_equal(found(policy, batches), expected(folder, groups_of()))


@pytest.mark.parametrize("max_tokens", [1000, 25])
def test_truncated_completions_that_are_masked_do_not_count(folder: Path, max_tokens: int) -> None:
    policy = policy_of(folder)
    batches = pack(groups_of(), max_tokens=max_tokens, share_prompts=policy.shares_prompts, mask_truncated=True)
    assert_equal(found(policy, batches), expected(folder, groups_of(), mask_truncated=True))


def test_prompts_that_are_not_shared_and_padded_rows(folder: Path) -> None:
    policy = policy_of(folder)
    batches = pack(groups_of(), max_tokens=25)
    assert_equal(found(policy, batches), expected(folder, groups_of()))
    policy.logprob_model.uses_packed_attention = False
    assert_equal(found(policy, batches), expected(folder, groups_of()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_next",
        "granitemoe",
        "granitemoehybrid",
        "jamba",
        "phimoe",
        "ernie4_5_moe",
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_family_with_such_a_loss(name: str, checkpointing: bool, tmp_path: Path) -> None:
    folder = zoo_folder(name, tmp_path)
    policy = policy_of(folder, gradient_checkpointing=checkpointing)
    batches = pack(groups_of(), max_tokens=40, share_prompts=policy.shares_prompts)
    assert_equal(found(policy, batches), expected(folder, groups_of()))


@pytest.mark.slow
def test_a_family_that_runs_on_padded_rows(tmp_path: Path) -> None:
    folder = zoo_folder("gpt_oss", tmp_path)
    policy = policy_of(folder)
    assert not policy.uses_packed_attention
    assert_equal(found(policy, pack(groups_of(), max_tokens=40)), expected(folder, groups_of()))


def learn(policy: Policy, coefficient: float, advantages_PG: Tensor, skip_flat: bool, iterations: int = 1) -> Sums:
    objective = ObjectiveConfig(beta=0.0, router_aux_loss_coef=coefficient, num_iterations=iterations)
    config = Config(objective=objective, sampling=SamplingConfig(max_completion_length=12))
    run: Any = SimpleNamespace(config=config, accelerator=policy.accelerator, policy=policy, beta=0.0)
    groups = groups_of()[:1]
    batches = pack(groups, advantages_PG, max_tokens=30, skip_flat=skip_flat, share_prompts=policy.shares_prompts)
    sums = Sums()
    update(run, Experience(groups, [Packed(batches, len(batches))], advantages_PG), sums, Clock())
    return sums


def test_the_objective_holds_the_loss_and_flat_groups_are_trained(folder: Path) -> None:
    flat = torch.zeros(1, 3, dtype=torch.float64)
    policy = policy_of(folder)
    assert policy.has_router_loss
    before = expected(folder, groups_of()[:1])[0]
    sums = learn(policy, COEFFICIENT, flat, skip_flat=False, iterations=2)
    metrics = policy.expert_metrics()
    assert sums.count("grad_norm") == 2
    # The log holds the second of the two passes, after one optimizer step.
    assert sums.total("loss") == pytest.approx(COEFFICIENT * (before + metrics["policy/router_aux_loss"]), rel=1e-5)
    assert abs(metrics["policy/router_aux_loss"] - before) > 1e-4


@pytest.mark.parametrize("max_tokens", [1000, 30])
def test_each_mini_batch_has_a_load_of_its_own(folder: Path, max_tokens: int) -> None:
    """Without advantages, the loss of each optimizer step is that of the load of its own group."""
    parts = groups_of()
    policy: Any = policy_of(folder)
    policy.step = lambda usable: 0.0  # gradients add up, weights stay
    config = Config(
        objective=ObjectiveConfig(beta=0.0, router_aux_loss_coef=COEFFICIENT, mini_batches=2),
        sampling=SamplingConfig(max_completion_length=12),
    )
    flat = torch.zeros(2, 3, dtype=torch.float64)
    unused: Any = SimpleNamespace(engine=None)
    collector = ExperienceCollector(
        config, policy.accelerator, policy, unused, unused, unused, tokens_per_batch=max_tokens
    )
    packed = collector._pack(parts, flat)
    assert [len(part.batches) for part in packed] == {1000: [1, 1], 30: [2, 1]}[max_tokens]
    run: Any = SimpleNamespace(
        config=config, accelerator=policy.accelerator, policy=policy, beta=0.0, collector=collector
    )
    sums = Sums()
    update(run, Experience(parts, packed, flat), sums, Clock())
    (first, gradient), (second, more) = (expected(folder, [part]) for part in parts)
    assert sums.total("loss") == pytest.approx(COEFFICIENT * (first + second), rel=1e-5)
    zero = torch.zeros((), requires_grad=True)
    assert_equal(
        (policy.expert_metrics()["policy/router_aux_loss"], gradients(policy.model, zero * 1)),
        (second, gradient + more),
    )
    both = expected(folder, parts)
    assert abs(both[0] - (first + second) / 2) > 1e-4  # the load of all completions together is another one


def test_a_coefficient_of_0_measures_the_load_without_a_gradient(folder: Path) -> None:
    policy = policy_of(folder, 0.0)
    assert not policy.has_router_loss
    passes: list[int] = []
    policy.logprob_model.register_forward_hook(lambda *_: passes.append(1))
    sums = learn(policy, 0.0, torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64), skip_flat=True)
    assert len(passes) == 2  # no forward pass besides those of the two batches
    assert sums.total("loss") == pytest.approx(-1.0, rel=1e-5)
    assert policy.expert_metrics()["policy/router_aux_loss"] == pytest.approx(
        expected(folder, groups_of()[:1])[0], rel=1e-5
    )


def test_the_coefficient_is_that_of_the_model_unless_one_is_given(folder: Path) -> None:
    own, none, other = (policy_of(folder, coefficient) for coefficient in (None, 0.0, 0.25))
    assert [policy.balance.coefficient for policy in (own, none, other) if policy.balance] == [0.001, 0.0, 0.25]
    adapted = policy_of(folder, lora=LoraConfig(r=2))
    assert adapted.balance is not None and adapted.balance.experts_per_token == 2


def test_a_coefficient_without_routers_is_refused(tmp_path: Path) -> None:
    policy = policy_of(zoo_folder("llama", tmp_path / "dense"), None)
    assert policy.balance is None and policy.router_loss() == 0.0 and policy.expert_metrics() == {}
    with pytest.raises(ConfigError, match=r"coef is 0.5, but LlamaForCausalLM has no routers that a loss balances"):
        policy_of(tmp_path / "dense")


def test_the_log_says_what_is_trained(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="grpo")
    policy_of(folder, None)
    policy_of(folder, lora=LoraConfig(r=2))
    policy_of(folder, lora=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    lines = [message for message in caplog.messages if message.startswith("mixture of experts")]
    assert lines == [
        "mixture of experts: router_aux_loss_coef 0.001; experts and routers are trained",
        "mixture of experts: router_aux_loss_coef 0.5; adapters: down_proj (rank 2 for each expert), "
        "gate_up_proj (rank 4 for each expert); other layers: gate, k_proj, o_proj, q_proj, v_proj",
        "mixture of experts: router_aux_loss_coef 0.5; adapters: none in experts that are one tensor; other layers: "
        "q_proj, v_proj",
    ]


def test_the_load_by_hand() -> None:
    """2 layers, 4 experts, 1 of them per token; 3 tokens, of which the second counts twice and the third not."""
    balance = LoadBalance(Accelerator(cpu=True), 1.0, 1)
    logits = torch.tensor([[7.0, 1, 1, 1], [1, 7.0, 1, 1], [1, 1, 1, 7.0]]).log()
    balance.record((logits, logits[:, [1, 0, 2, 3]]), torch.tensor([1.0, 2.0, 0.0]))
    sums = balance.take()
    assert sums.chosen_LE.tolist() == [[1, 2, 0, 0], [2, 1, 0, 0]]
    assert sums.probability_E.tolist() == pytest.approx([0.7 + 2 * 0.1 + 0.1 + 2 * 0.7] * 2 + [0.6] * 2)
    metrics = load_metrics(sums, 1)
    assert metrics["policy/router_aux_loss"] == pytest.approx(4 * (0.5 * 2.4 / 6 + 0.5 * 2.4 / 6), rel=1e-6)
    assert metrics["policy/expert_load_max"] == 2 / (3 / 4)
    assert load_metrics(sums, 2)["policy/expert_load_max"] == 2 / (3 * 2 / 4)
    assert metrics["policy/experts_unused"] == 0.5
    assert load_metrics(RouterSums(torch.zeros(2, 4), torch.zeros(4), torch.tensor(0.0)), 1) == {}


def test_counts_by_hand() -> None:
    groups = [group(0, [5, 6], [[7, 8], [9]])]
    groups[0].completions[1] = replace(groups[0].completions[1], ended=False)
    [batch] = pack(groups, max_tokens=99)
    assert row_counts(batch).tolist() == [2, 2, 1, 1, 1]
    assert padded_row_counts(batch, 4).tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    [masked] = pack(groups, max_tokens=99, mask_truncated=True)
    assert row_counts(masked).tolist() == [1, 1, 1, 1, 0]
    assert padded_row_counts(masked, 4).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
