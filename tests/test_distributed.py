"""Real processes: the same seed with one and with two gives the same groups, rewards and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo.distributed import cpu_threads
from tests.fakes import tiny_data, tiny_folder

ROOT = Path(__file__).parent.parent
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def launch(tmp_path: Path, run: str, launcher: list[str], **changes: object) -> subprocess.CompletedProcess:
    settings = {
        "model.name": tmp_path / "model",
        "data.path": tmp_path / "data.jsonl",
        "data.eval_path": tmp_path / "data.jsonl",
        "data.system_prompt": "null",
        "run_dir": tmp_path / run,
        "steps": 3,
        "prompts_per_step": 5,
        "sampling.num_generations": 4,
        "sampling.max_completion_length": 8,
        "optimizer.learning_rate": 0.001,
        "tokens_per_batch": 64,
        "data.max_prompt_length": 16,
        "eval_every": 3,
        "tracking.report_to": "[]",
        "rewards": '{"tests.letters:count_letters": 1.0}',
    } | changes
    flags = [f"--{key}={value}" for key, value in settings.items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, str(ROOT / "launch" / "train.py"), *flags],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl", rows=11)
    one = launch(tmp_path, "one", [sys.executable])
    assert one.returncode == 0, one.stderr
    two = launch(tmp_path, "two", [*ACCELERATE, "--config_file", str(ROOT / "accelerate_configs" / "cpu_2proc.yaml")])
    records = []
    for run in ("one", "two"):
        assert (tmp_path / run / "final").is_dir(), two.stderr
        records.append([json.loads(line) for line in (tmp_path / run / "rollouts.jsonl").read_text().splitlines()])
    for first, second in zip(*records, strict=True):
        for key in ("step", "draw", "sample", "completion", "reward", "length"):
            assert first[key] == second[key]
        assert abs(first["advantage"] - second["advantage"]) < 1e-9
    weights = [load_file(tmp_path / run / "final" / "model.safetensors") for run in ("one", "two")]
    for key in weights[0]:
        assert torch.allclose(weights[0][key], weights[1][key], rtol=1e-5, atol=1e-5), key
    metrics = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    for first, second in zip(*metrics, strict=True):
        for key, value in first.items():
            if not key.startswith(("time/", "memory/", "rollout/tokens_per_second")):
                assert second[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


@pytest.mark.slow
def test_fewer_processes_than_asked_for_are_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl")
    refused = launch(tmp_path, "run", [*ACCELERATE, "--cpu", "--num_processes", "2"])
    assert "2 processes were asked for, 1 started" in refused.stderr
    assert refused.returncode != 0


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what accelerate launch sets when nobody chose
    assert cpu_threads(1) == cores
    assert cpu_threads(cores) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpu_threads(2) == 3
