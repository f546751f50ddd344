"""Optimizers by name: AdamW by hand, a user's own optimizer, and hyperparameters overridden by the config."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from grpo.config.parser import load_config
from grpo.config.schema import ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.errors import ConfigError
from grpo.models.optimizers import ADAMW, OPTIMIZERS, build_scheduler, override_hyperparameters
from grpo.policy import Policy
from grpo.run.components import check_components
from tests.fakes import tiny_folder
from tests.models.strategies.rank_program import batch_of, full_weights

OWN = """
import torch

def sgd(parameters, config, *, fused):
    return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=0.5)
"""


def test_adamw_by_hand() -> None:
    """The first step of Adam is lr * g / (|g| + epsilon), after the decay lr * decay * w."""
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = OPTIMIZERS.get(config.optim)([weight], config, fused=None)
    weight.grad = torch.tensor([3.0, -0.2])
    optimizer.step()
    assert torch.allclose(weight, torch.tensor([2.0 * 0.95 - 0.1, -1.0 * 0.95 + 0.1]), atol=1e-6)


def test_a_function_in_a_file_trains_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    folder = str(tiny_folder(tmp_path / "model"))
    config = OptimizerConfig(optim=f"{tmp_path}/mine.py:sgd", learning_rate=0.001, max_grad_norm=1e9)

    def policy() -> Policy:
        parts = (ModelConfig(), ObjectiveConfig(beta=0.0), config)
        return Policy(Accelerator(cpu=True), folder, *parts, temperature=1.0, optimizer_steps=10)

    first = policy()
    name = "model.layers.0.mlp.down_proj.weight"
    before = full_weights(first)[name]
    first.backward(-first.logprobs(batch_of(0))[0].sum())
    gradient = dict(first.model.named_parameters())[name].grad.clone()
    first.step()
    assert torch.allclose(full_weights(first)[name], before - 0.001 * gradient, atol=1e-7)
    tensors, state = first.state_dict()
    second = policy()
    second.load_state_dict({key: {n: t.clone() for n, t in part.items()} for key, part in tensors.items()}, state)
    for one in (first, second):
        one.backward(-one.logprobs(batch_of(1))[0].sum())
        one.step()
    assert torch.equal(full_weights(first)[name], full_weights(second)[name])


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown optimizer 'adam'.*" + ADAMW):
        check_components(load_config(["--model.name=m", "--optimizer.optim=adam"]))


def test_hyperparameters_of_the_config_replace_restored_ones() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    old = OptimizerConfig(learning_rate=1.0, adam_beta1=0.5, weight_decay=0.1)
    optimizer = OPTIMIZERS.get(ADAMW)([weight], old, fused=None)
    scheduler = build_scheduler(optimizer, old, 10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    override_hyperparameters(optimizer, scheduler, OptimizerConfig(learning_rate=2.0))
    [group] = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (pytest.approx(1.0), (0.9, 0.999), 0.0)
    assert scheduler.get_last_lr() == pytest.approx([1.0])
