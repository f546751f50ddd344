"""Optimizers by name: AdamW by hand, a user's own optimizer, and hyperparameters overridden by the config."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from grpo.config.parser import load_config
from grpo.config.schema import Config, ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.errors import ConfigError
from grpo.models.optimizers import (
    ADAMW,
    OPTIMIZERS,
    SCHEDULES,
    allocate_moments,
    build_scheduler,
    override_hyperparameters,
)
from grpo.models.strategies.base import Strategy
from grpo.models.strategies.registry import strategy_for
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


@pytest.mark.parametrize("fused", [True, None])
def test_moments_that_are_allocated_early_change_nothing(fused: bool | None) -> None:
    """Keys, dtypes and devices are those of torch, and so are the weights after two steps. SGD has no moments."""
    config, states, weights = OptimizerConfig(learning_rate=0.1), [], []
    for early in (False, True):
        weight = torch.nn.Parameter(torch.tensor([[2.0, -1.0]]).T.contiguous().T)  # strides that are not the default
        unused = torch.nn.Parameter(torch.ones(3))
        optimizer = OPTIMIZERS.get(ADAMW)([weight, unused], config, fused=fused)
        if early:
            allocate_moments(optimizer)
            assert (
                float(optimizer.state[weight]["step"]) == 0 and optimizer.state[unused]["exp_avg"].tolist() == [0] * 3
            )
        for gradient in ([[3.0, -0.2]], [[-1.0, 0.5]]):
            weight.grad = torch.tensor(gradient)
            optimizer.step()
        states.append(optimizer.state[weight])
        weights.append(weight.detach())
    assert states[0].keys() == states[1].keys() and torch.equal(*weights)
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
        assert (value.dtype, value.device, value.stride()) == (
            states[1][key].dtype,
            states[1][key].device,
            states[1][key].stride(),
        )
    plain = OPTIMIZERS.get("sgd")([torch.nn.Parameter(torch.ones(2))], config, fused=None)
    allocate_moments(plain)
    assert not plain.state


def test_a_policy_has_its_moments_before_it_samples(tmp_path: Path) -> None:
    parts = (ModelConfig(), ObjectiveConfig(beta=0.0), OptimizerConfig())
    policy = Policy(Accelerator(cpu=True), str(tiny_folder(tmp_path)), *parts, temperature=1.0, optimizer_steps=10)
    for parameter in policy.model.parameters():
        assert policy.optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_other_optimizers_by_hand() -> None:
    """SGD: w - lr * (g + decay * w). Adafactor, first step of a vector: lr * g / |g|, clipped at an RMS of 1."""
    config = OptimizerConfig(optim="sgd", learning_rate=0.1, weight_decay=0.5)
    for name, expected in [("sgd", [2.0 - 0.1 * (3 + 1), -1.0 - 0.1 * (-0.2 - 0.5)]), ("adafactor", None)]:
        weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
        optimizer = OPTIMIZERS.get(name)([weight], config, fused=None)
        weight.grad = torch.tensor([3.0, -0.2])
        optimizer.step()
        expected = expected or [2.0 * 0.95 - 0.1, -1.0 * 0.95 + 0.1]
        assert weight.tolist() == pytest.approx(expected, rel=1e-4), name


def trained_and_resumed(optimizer: OptimizerConfig, folder: str) -> tuple[Policy, Policy]:
    """Return a policy after two steps, and one that resumed after the first step and took the second."""

    def policy() -> Policy:
        parts = (ModelConfig(), ObjectiveConfig(beta=0.0), optimizer)
        return Policy(Accelerator(cpu=True), folder, *parts, temperature=1.0, optimizer_steps=10)

    first, second = policy(), policy()
    first.backward(-first.logprobs(batch_of(0))[0].sum())
    first.step()
    tensors, state = first.state_dict()
    copied = {key: {n: t.clone() for n, t in part.items()} for key, part in tensors.items()}
    second.load_state_dict(copied, json.loads(json.dumps(state)))
    for one in (first, second):
        one.backward(-one.logprobs(batch_of(1))[0].sum())
        one.step()
    return first, second


@pytest.mark.parametrize("name", ["adafactor", "sgd", "adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_every_optimizer_moves_the_weights_and_resumes_to_the_bit(tmp_path: Path, name: str) -> None:
    if "_8bit" in name or "paged" in name:
        pytest.importorskip("bitsandbytes")
    folder = str(tiny_folder(tmp_path / "model"))
    first, second = trained_and_resumed(OptimizerConfig(optim=name, learning_rate=0.01), folder)
    start = trained_and_resumed(OptimizerConfig(optim=name, learning_rate=0.0), folder)[0]
    for key, weight in full_weights(first).items():
        assert torch.equal(weight, full_weights(second)[key]), key
    assert any(not torch.equal(weight, full_weights(start)[key]) for key, weight in full_weights(first).items())


def test_an_optimizer_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.models.optimizers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="optim adamw_8bit needs bitsandbytes: pip install bitsandbytes"):
        check_components(load_config(["--model.name=m", "--optimizer.optim=adamw_8bit"]))


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
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([2.0 * 0.4])  # later steps too: linear, 6 of 10 are done


def rates(config: OptimizerConfig, steps: int) -> list[float]:
    """Return the learning rate of each step, and that after the last one."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    scheduler, found = build_scheduler(optimizer, config, steps), []
    for _ in range(steps + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


NEEDED = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}


def test_schedules_by_hand() -> None:
    """Ten steps, learning rate 1, two of them warm-up."""

    def of(name: str, warmup: float = 0.2, **settings: object) -> list[float]:
        given = OptimizerConfig(
            learning_rate=1.0, warmup_ratio=warmup, lr_scheduler_type=name, lr_scheduler_kwargs=settings
        )
        check_components(Config(steps=10, optimizer=given))
        return rates(given, 10)

    assert of("linear") == pytest.approx([0, 0.5, *[1 - n / 8 for n in range(9)]])
    assert of("constant_with_warmup") == pytest.approx([0, 0.5, *[1.0] * 9])
    assert of("constant", warmup=0.0) == [1.0] * 11
    assert of("cosine")[2:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * n / 8) for n in range(9)])
    floor = of("cosine_with_min_lr", min_lr_rate=0.1)
    assert floor[2] == 1 and floor[10] == pytest.approx(0.1)
    decay = of("warmup_stable_decay", num_decay_steps=4, decay_type="linear")
    assert decay == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert of("polynomial", lr_end=0.2, power=1.0)[10] == pytest.approx(0.2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_that_is_offered_runs(name: str) -> None:
    given = OptimizerConfig(learning_rate=1.0, lr_scheduler_type=name, lr_scheduler_kwargs=NEEDED.get(name, {}))
    check_components(Config(steps=10, optimizer=given))
    assert all(0 <= rate <= 1 for rate in rates(given, 10))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cosin", {}, "lr_scheduler_type is 'cosin', it must be one of linear, .*: did you mean 'cosine'"),
        ("reduce_lr_on_plateau", {}, "lr_scheduler_type is 'reduce_lr_on_plateau', it must be one of"),
        ("greedy", {}, "lr_scheduler_type is 'greedy', it must be one of"),
        ("cosine_with_min_lr", {}, "cosine_with_min_lr cannot be computed .*min_lr or min_lr_rate should be set"),
        ("cosine_with_min_lr", {"min_lr": "low"}, "cosine_with_min_lr cannot be computed"),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0, "warmup_lr_rate": -1}, "gives learning rates from -1 to 1"),
        ("warmup_stable_decay", {}, "warmup_stable_decay needs optimizer.lr_scheduler_kwargs.num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 11}, "num_decay_steps is 11, but there are 10 optimizer steps"),
        ("warmup_stable_decay", {"num_decay_steps": 1, "decay_type": "fast"}, "Unknown decay type: fast"),
        ("linear", {"min_lr": 0.1}, "lr_scheduler_kwargs has 'min_lr', which linear does not take: it takes none"),
        ("constant", {"num_cycles": 2}, "which constant does not take"),
        ("polynomial", {"lr_end": 2.0}, "polynomial cannot be computed .*lr_end"),
        ("inverse_sqrt", {"timescale": 0}, "inverse_sqrt cannot be computed|timescale"),
    ],
)
def test_a_schedule_that_cannot_be_computed_is_refused_early(name: str, settings: dict, message: str) -> None:
    given = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.2, lr_scheduler_type=name, lr_scheduler_kwargs=settings)
    with pytest.raises(ConfigError, match=message):
        check_components(Config(steps=10, optimizer=given))


def stepped(max_grad_norm: float, gradient: float, usable: bool = True) -> tuple[float, bool, float]:
    """Return the norm and the verdict of a step of SGD at learning rate 1, and by how much it moved a weight."""
    strategy, layer = strategy_for(Accelerator(cpu=True)), torch.nn.Linear(1, 1, bias=False)
    strategy.configure(ModelConfig(), OptimizerConfig(max_grad_norm=max_grad_norm))
    strategy.module, strategy.prepared_optimizer = layer, torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.item()
    layer.weight.grad = torch.full((1, 1), gradient)
    norm, taken = Strategy.clip_and_step(strategy, usable)
    assert layer.weight.grad is None or layer.weight.grad.item() == 0  # nothing is left for the next step
    return norm, taken, before - layer.weight.item()


def test_the_gradient_is_clipped_to_max_grad_norm() -> None:
    assert stepped(2.0, 300.0) == (300.0, True, pytest.approx(2.0, rel=1e-4))
    assert stepped(2.0, 1.5) == (1.5, True, pytest.approx(1.5, rel=1e-4))


@pytest.mark.parametrize("value", [0.0, math.inf])
def test_no_clipping(value: float) -> None:
    """0 means no clipping, as in TRL and transformers. torch would scale the gradient to 0."""
    assert stepped(value, 300.0) == (300.0, True, pytest.approx(300.0))


@pytest.mark.parametrize(("gradient", "usable"), [(math.inf, True), (math.nan, True), (1.0, False)])
def test_a_step_that_is_not_finite_moves_no_weight(gradient: float, usable: bool) -> None:
    _, taken, moved = stepped(1.0, gradient, usable)
    assert not taken and moved == 0
