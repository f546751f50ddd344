"""grpo fork: equal until the change can act, common random numbers after it, and a comparison by step."""

from pathlib import Path

import pytest

from grpo.errors import ConfigError
from grpo.tools.fork import fork, summary
from tests.tools.test_verify import recorded  # noqa: F401  (a fixture)


@pytest.mark.slow
def test_a_change_acts_after_the_first_step_of_the_fork(recorded: Path, tmp_path: Path) -> None:  # noqa: F811
    found = fork(recorded / "run", 2, ["optimizer.learning_rate=0.0"], tmp_path / "fork")
    assert sorted(found.metrics) == [3, 4]
    assert found.equal[3] == 1.0  # sampled with the same weights and random numbers
    assert found.first is None or found.first.step == 4
    assert found.metrics[3]["reward/mean"][0] == found.metrics[3]["reward/mean"][1]
    assert found.metrics[4]["policy/learning_rate"] == (pytest.approx(0.0025), 0.0)
    assert "| 3 | 100% |" in summary(found)


@pytest.mark.slow
def test_without_a_change_everything_is_equal(recorded: Path, tmp_path: Path) -> None:  # noqa: F811
    found = fork(recorded / "run", 2, ["optimizer.learning_rate=0.01"], tmp_path / "fork")
    assert found.first is None and found.equal == {3: 1.0, 4: 1.0}
    for metrics in found.metrics.values():
        assert all(a == b for key, (a, b) in metrics.items() if not key.startswith(("time/", "memory/", "rollout/tok")))


def test_what_cannot_be_forked_is_refused(recorded: Path, tmp_path: Path) -> None:  # noqa: F811
    run = recorded / "run"
    for step, setting, until, message in (
        (3, "seed=1", None, "has checkpoints of step 2, 4; 0 is the start"),
        (2, "learning_rate=1", None, "a key of the config"),
        (2, "seed", None, "give KEY=VALUE"),
        (2, "seed=1", 2, "the fork starts at step 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            fork(run, step, [setting], tmp_path / "fork", until)
    with pytest.raises(ConfigError, match="exists"):
        fork(run, 2, ["seed=1"], run)
