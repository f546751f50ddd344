"""Doctor: checks pass on this machine, a wrong kernel fails one, and the exit code and the file say so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.kernels import registry, self_test
from grpo.tools import doctor


@pytest.fixture(autouse=True)
def nothing_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_failed", {})


def test_checks_and_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PRECISIONS", {torch.float32: doctor.PRECISIONS[torch.float32]})
    doctor.main(["--quick", "--output", str(tmp_path / "doctor.json")])
    found: dict[str, Any] = json.loads((tmp_path / "doctor.json").read_text())
    checks = found["precisions"]["float32"]["checks"]
    assert found["ok"] and len(checks) == 6 and all(check["ok"] for check in checks.values())
    assert torch.__version__.startswith(found["versions"]["torch"]) and found["kernels"].startswith("kernels: ")
    assert "all checks passed" in capsys.readouterr().out

    monkeypatch.setattr(self_test, "attention_leak", lambda *_: 1e-3)
    monkeypatch.setattr(self_test, "head_error", lambda *_: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--quick"])
    shown = capsys.readouterr().out
    assert ended.value.code == 1 and "FAILED float32   tokens of another group" in shown
    assert "ZeroDivisionError" in shown and "checks FAILED" in shown


def test_timing_and_its_batch() -> None:
    seconds = doctor._seconds(lambda: torch.ones(10), torch.device("cpu"))
    assert 0 < seconds < 10
    batch = doctor._update_batch(4000)
    assert len(batch.input_ids_T) == 2 * (16 + 16 * 120)


@pytest.mark.slow
def test_rates() -> None:
    rates = doctor._rates(doctor._model(torch.device("cpu")), torch.device("cpu"), torch.float32)
    assert len(rates) == 6 and all(value > 0 for value in rates.values())


@pytest.mark.gpu
def test_everything_on_a_gpu() -> None:
    found = doctor.examine()
    assert found["device"] == "CUDA" and found["ok"], doctor.lines(found)
    assert {"float32", "float16"} <= found["precisions"].keys()
