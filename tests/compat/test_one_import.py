"""One script on both libraries: every value that both log agrees, and so do the weights."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
@pytest.mark.parametrize("loss, iterations", [("dapo", "1"), ("dapo", "2"), ("grpo", "1")])
def test_the_same_script_logs_the_same(loss: str, iterations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason='pip install -e ".[benchmark]"')
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    sys.modules.pop("one_import", None)
    from one_import import compare

    found = compare({"LOSS": loss, "ITERATIONS": iterations})
    assert found["loss"] < 1e-5 and found["weights"] < 1e-5
    wanted = {"loss", "reward", "reward_std", "frac_reward_zero_std", "epoch", "completions/mean_length"}
    wanted |= {"grad_norm"} if iterations == "1" else set()
    assert wanted <= found["differences"].keys() and found["entries"] >= 3
    assert found["largest"] < 1e-5, found["key"]
