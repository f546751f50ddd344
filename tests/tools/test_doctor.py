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
    assert found["ok"] and len(checks) == 7 and all(check["ok"] for check in checks.values())
    assert torch.__version__.startswith(found["versions"]["torch"]) and found["kernels"].startswith("kernels: ")
    assert "all checks passed" in capsys.readouterr().out

    monkeypatch.setattr(self_test, "attention_leak", lambda *_: 1e-3)
    monkeypatch.setattr(self_test, "head_error", lambda *_: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--quick"])
    shown = capsys.readouterr().out
    assert ended.value.code == 1 and "FAILED float32   tokens of another group" in shown
    assert "ZeroDivisionError" in shown and "checks FAILED" in shown


def test_what_is_off_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._off(cpu) == {}
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "built without CUDA" in doctor._off(cpu)["GPU"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "finds no GPU" in doctor._off(cpu)["GPU"]
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert list(doctor._off(gpu)) == ["bfloat16", "attention of cuDNN"]
    capability = (9, 0)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert list(doctor._off(gpu)) == ["attention of cuDNN", "float32 products"]


def test_rates_that_cannot_be_measured_are_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_rates", lambda *_: torch.empty(2**60))
    found = doctor._examine(torch.device("cpu"), torch.float32, rates=True)
    assert not found["checks"]["rates"]["ok"] and found["rates"] == {}


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
