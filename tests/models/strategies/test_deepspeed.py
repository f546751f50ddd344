"""DeepSpeed's settings; training with it is in test_ranks.py and in tests/runtime/test_distributed.py."""

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import InitProcessGroupKwargs

from grpo.config.schema import ModelConfig, OptimizerConfig
from grpo.errors import ConfigError
from grpo.models.strategies.deepspeed import Zero2, Zero3


def test_an_optimizer_that_the_schedule_would_not_reach_is_refused() -> None:
    settings: dict[str, Any] = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    plugin = SimpleNamespace(deepspeed_config=settings)
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    strategy = Zero2(accelerator)
    with pytest.raises(ConfigError, match="offload_optimizer_device is cpu"):
        strategy.configure(ModelConfig(), OptimizerConfig())
    settings["zero_optimization"]["offload_optimizer"]["device"] = "none"
    strategy.configure(ModelConfig(), OptimizerConfig())
    assert settings["gradient_clipping"] == 1.0


def test_a_machine_without_a_gpu_uses_gloo_and_no_cpu_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    process_group = InitProcessGroupKwargs()
    assert Zero3.before_start(True, process_group) is False
    assert process_group.backend == "gloo"
