"""Selection of a strategy, and registration of a new one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator, DistributedType

from grpo.errors import ConfigError
from grpo.models.strategies.base import Machine, ModelSize
from grpo.models.strategies.deepspeed import Zero2, Zero3
from grpo.models.strategies.fsdp import FullyShardedDataParallel
from grpo.models.strategies.registry import (
    STRATEGIES,
    check_accelerate_settings,
    machine_of,
    strategy_class,
    strategy_for,
)
from grpo.models.strategies.single import DistributedDataParallel, SingleProcess
from tests.fakes import tiny_folder
from tests.models.strategies.rank_program import learn, tiny_policy

SIZE = ModelSize(total=100, trained=60, largest_weight=30, largest_unit=40, loaded_bytes=400, adapter_bytes=0)


def accelerator(kind: DistributedType, stage: int = 0) -> Any:
    return SimpleNamespace(
        distributed_type=kind, state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    )


@pytest.mark.parametrize(
    ("kind", "stage", "expected"),
    [
        (DistributedType.NO, 0, SingleProcess),
        (DistributedType.MULTI_CPU, 0, DistributedDataParallel),
        (DistributedType.MULTI_GPU, 0, DistributedDataParallel),
        (DistributedType.FSDP, 0, FullyShardedDataParallel),
        (DistributedType.DEEPSPEED, 2, Zero2),
        (DistributedType.DEEPSPEED, 3, Zero3),
    ],
)
def test_one_strategy_per_setup(kind: DistributedType, stage: int, expected: type) -> None:
    assert type(strategy_for(accelerator(kind, stage))) is expected


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("ACCELERATE_USE_FSDP", FullyShardedDataParallel),
        ("ACCELERATE_USE_DEEPSPEED", Zero3),
        (None, DistributedDataParallel),
    ],
)
def test_the_environment_requests_it_before_processes_start(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, expected: type
) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "true")
    assert next(strategy for strategy in STRATEGIES if strategy.is_requested()) is expected


def test_kinds_are_unique_and_found() -> None:
    assert len({strategy.kind for strategy in STRATEGIES}) == len(STRATEGIES)
    assert all(strategy_class(Machine(strategy.kind)) is strategy for strategy in STRATEGIES)


def test_an_accelerate_config_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the accelerate config .*none.yaml"):
        machine_of(str(tmp_path / "none.yaml"))


def test_shards_by_hand() -> None:
    sharded = FullyShardedDataParallel.memory(SIZE, Machine("fsdp2", 4, "bf16"))
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (100, 60, 120)
    assert (sharded.gathered, sharded.start) == (2 * 4 * 40, 400)
    once = FullyShardedDataParallel.memory(SIZE, Machine("fsdp2", 4, "bf16", cpu=False, reads_once=True))
    assert once.start == 4 * 30
    away = FullyShardedDataParallel.memory(SIZE, Machine("fsdp2", 4, "bf16", cpu=False, offloads=True))
    assert (away.weights, away.gradients, away.optimizer, away.released) == (0, 0, 0, 0)
    zero2 = Zero2.memory(SIZE, Machine("zero2", 4, "bf16"))
    assert (zero2.weights, zero2.gradients, zero2.optimizer, zero2.gathered) == (200 + 60, 60, 120, 0)
    zero3 = Zero3.memory(SIZE, Machine("zero3", 4, "bf16"))
    assert (zero3.weights, zero3.gathered, zero3.start) == (50 + 60, 2 * 2 * 40, 400)


def test_a_new_strategy_is_one_class_and_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Counting(SingleProcess):
        kind = "counting"

        def clip_and_step(self, usable: bool) -> tuple[float, bool]:
            calls.append(usable)
            return super().clip_and_step(usable)

    monkeypatch.setattr("grpo.models.strategies.registry.STRATEGIES", [Counting, *STRATEGIES])
    policy = tiny_policy(Accelerator(cpu=True), str(tiny_folder(tmp_path / "model")), "full")
    learn(policy, [0])
    assert type(policy.strategy) is Counting and calls == [True]
    assert strategy_class(Machine("counting")) is Counting


@pytest.mark.parametrize(
    ("variable", "value", "accepted"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", False),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", True),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", False),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", False),
        ("ACCELERATE_DYNAMO_BACKEND", "NO", True),
        ("ACCELERATE_MIXED_PRECISION", "fp8", False),
        ("ACCELERATE_MIXED_PRECISION", "bf16", True),
        ("ACCELERATE_USE_MEGATRON_LM", "true", False),
        ("ACCELERATE_USE_MEGATRON_LM", "false", True),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "1", False),
    ],
)
def test_settings_of_accelerate_that_change_training_are_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, accepted: bool
) -> None:
    monkeypatch.setenv(variable, value)
    if accepted:
        check_accelerate_settings()
    else:
        with pytest.raises(ConfigError, match=f"{variable} in the environment"):
            check_accelerate_settings()
