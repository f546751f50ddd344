"""One process: state by plain names, a checkpoint of another model, skipped updates."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from grpo.errors import ConfigError
from grpo.models.strategies.base import Machine, ModelSize
from grpo.models.strategies.single import DistributedDataParallel, SingleProcess
from grpo.policy import Policy
from tests.fakes import tiny_folder
from tests.models.strategies.rank_program import batch_of, full_weights, learn, tiny_policy

SIZE = ModelSize(total=100, trained=60, largest_weight=30, largest_unit=40, loaded_bytes=400, adapter_bytes=0)


def policy_of(tmp_path: Path, case: str = "full") -> Policy:
    return tiny_policy(Accelerator(cpu=True), str(tiny_folder(tmp_path / "model")), case)


def test_a_plain_model_supports_everything(tmp_path: Path) -> None:
    strategy = policy_of(tmp_path).strategy
    assert type(strategy) is SingleProcess
    assert strategy.supports_shared_prompts and strategy.uses_kernels
    assert strategy.fused_optimizer is True
    assert strategy.holds_exact_weights and not strategy.broadcasts_checkpoint


@pytest.mark.parametrize("case", ["full", "lora"])
def test_a_checkpoint_continues_to_the_bit(tmp_path: Path, case: str) -> None:
    policy = policy_of(tmp_path, case)
    learn(policy, [0, 1])
    tensors, state = policy.state_dict()
    names = set(tensors["model"])
    assert names and all(("lora_" in name) == (case == "lora") for name in names)
    again = policy_of(tmp_path, case)
    again.load_state_dict({key: {n: t.clone() for n, t in part.items()} for key, part in tensors.items()}, state)
    for one in (policy, again):
        learn(one, [0])
    ours, theirs = full_weights(policy), full_weights(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert policy.learning_rate == again.learning_rate == pytest.approx(0.008)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    adapted, plain = policy_of(tmp_path, "lora"), policy_of(tmp_path)
    with pytest.raises(ConfigError, match="the checkpoint holds .*lora_A.* more weights that this model does not have"):
        plain.load_state_dict(*adapted.state_dict())


def test_an_unusable_step_changes_neither_weights_nor_moments(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    learn(policy, [0])
    before, moments = full_weights(policy), policy.strategy.state_dict()[1]["state"]
    moments = {index: {key: value.clone() for key, value in state.items()} for index, state in moments.items()}
    with policy.accumulate(sync=True):
        policy.backward(-policy.logprobs(batch_of(0))[0].sum())
    assert policy.step(usable=False) > 0
    assert policy.skipped_in_a_row == 1
    assert all(torch.equal(value, before[name]) for name, value in full_weights(policy).items())
    after = policy.strategy.state_dict()[1]["state"]
    assert all(
        torch.equal(after[index][key], value) for index, state in moments.items() for key, value in state.items()
    )
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert policy.state_dict()[1]["skipped_in_a_row"] == 1


def test_memory_by_hand() -> None:
    one = SingleProcess.memory(SIZE, Machine())
    assert (one.weights, one.gradients, one.optimizer, one.released, one.gathered) == (400, 240, 480, 240, 0)
    two = DistributedDataParallel.memory(SIZE, Machine("ddp", 2))
    assert (two.weights, two.gradients, two.released) == (400, 480, 240)  # the buckets stay
    assert one.start is two.start is None
