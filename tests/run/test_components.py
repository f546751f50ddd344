"""Components: settings that the chosen components do not use are said, and refused where they contradict each other."""

import pytest

from grpo.config.parser import load_config
from grpo.errors import ConfigError
from grpo.run.components import check_components, settings_without_effect


def notes(*flags: str) -> list[str]:
    config = load_config(["--model.name=m", *flags])
    check_components(config)
    return settings_without_effect(config)


@pytest.mark.parametrize("loss", ["sapo", "vespo", "cispo", "rloo", "reinforce_plus_plus"])
def test_a_delta_is_no_error_where_the_loss_has_none(loss: str) -> None:
    """Below 1 + epsilon_high it is refused for the clipped losses only; elsewhere it has no effect, which is said."""
    line = f"objective.delta is 1.1, but has no effect: objective.loss_type '{loss}' does not use it"
    assert notes(f"--objective.loss_type={loss}", "--objective.delta=1.1") == [line]
    with pytest.raises(ConfigError, match="objective.delta is 1.1, needs to be above 1 . epsilon_high = 1.2"):
        notes("--objective.delta=1.1")


@pytest.mark.parametrize(
    ("loss", "flag", "is_used"),
    [
        ("dapo", "epsilon=0.1", True),
        ("dapo", "epsilon_high=0.28", True),
        ("dapo", "delta=4", True),
        ("dapo", "sapo_temperature_pos=2", False),
        ("dapo", "vespo_k_pos=1", False),
        ("dapo", "importance_sampling_level=sequence", True),
        ("cispo", "epsilon=0.1", False),
        ("cispo", "epsilon_high=4", True),
        ("sapo", "sapo_temperature_neg=2", True),
        ("sapo", "epsilon=0.1", False),
        ("sapo", "epsilon_high=0.28", False),
        ("vespo", "vespo_lambda_neg=1", True),
        ("vespo", "sapo_temperature_neg=2", False),
        ("rloo", "epsilon=0.1", False),
        ("vespo", "importance_sampling_level=sequence", True),  # the ratio weighs the KL (use_bias_correction_kl)
    ],
)
def test_a_setting_of_another_loss_is_said(loss: str, flag: str, is_used: bool) -> None:
    found = notes(f"--objective.loss_type={loss}", f"--objective.{flag}")
    assert len(found) == (0 if is_used else 1)
    assert is_used or found[0].startswith(f"objective.{flag.partition('=')[0]} is ")


def test_a_setting_of_the_kl_without_a_kl_is_said() -> None:
    assert notes() == []
    found = notes("--objective.beta=0", "--objective.kl_estimator=k2", "--objective.use_bias_correction_kl=false")
    assert found == [
        "objective.kl_estimator is k2, but has no effect: objective.beta is 0",
        "objective.use_bias_correction_kl is False, but has no effect: objective.beta is 0",
    ]
    assert len(notes("--objective.kl_horizon=5")) == 1
    assert notes("--objective.kl_horizon=5", "--objective.kl_target=0.1") == []
    level = "--objective.importance_sampling_level=sequence"
    assert len(notes("--objective.loss_type=vespo", level, "--objective.beta=0")) == 1


def test_a_warm_up_without_a_schedule_that_has_one_is_said() -> None:
    assert (
        "constant_with_warmup has one"
        in notes("--optimizer.warmup_ratio=0.1", "--optimizer.lr_scheduler_type=constant")[0]
    )
    assert notes("--optimizer.warmup_ratio=0.1") == []
