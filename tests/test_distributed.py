"""Real processes: the same seed with one and with two gives the same groups, rewards and weights."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo.distributed import cpu_threads
from grpo.errors import ConfigError
from grpo.zero import configure
from tests.fakes import tiny_data, tiny_folder

ROOT = Path(__file__).parent.parent
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def launch(
    tmp_path: Path, run: str, launcher: list[str], script: str = "launch/train.py", **changes: object
) -> subprocess.CompletedProcess:
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
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLLECTIVES": str(tmp_path / run)}
    return subprocess.run(
        [*launcher, str(ROOT / script), *flags],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )


def profile(name: str, *flags: str) -> list[str]:
    return [*ACCELERATE, "--config_file", str(ROOT / "accelerate_configs" / f"{name}.yaml"), *flags]


CPU_2 = profile("cpu_2proc")
CPU_3 = profile("cpu_2proc", "--num_processes", "3")
FSDP_2 = profile("fsdp2", "--num_processes", "2", "--mixed_precision", "no")
OFFLOADED = [*FSDP_2, "--fsdp_offload_params", "true"]
LORA = {"lora.r": 4, "lora.target_modules": "[q_proj, down_proj]"}


def zero(stage: int) -> list[str]:
    return profile(f"deepspeed_zero{stage}", "--num_processes", "2", "--mixed_precision", "no")


def same_run(tmp_path: Path, case: str) -> None:
    """The runs "one" and `case` drew, earned and learned the same."""
    for first, second in zip(*(records(tmp_path / run, "rollouts") for run in ("one", case)), strict=True):
        for key in ("step", "draw", "sample", "completion", "reward", "length"):
            assert first[key] == second[key], (case, key)
        assert abs(first["advantage"] - second["advantage"]) < 1e-9
    expected = load_file(tmp_path / "one" / "final" / "model.safetensors")
    weights = load_file(tmp_path / case / "final" / "model.safetensors")
    assert weights.keys() == expected.keys()
    for key in expected:
        assert torch.allclose(weights[key], expected[key], rtol=1e-5, atol=1e-5), (case, key)
    for first, second in zip(*(records(tmp_path / run, "metrics") for run in ("one", case)), strict=True):
        for key, value in first.items():
            if not key.startswith(("time/", "memory/", "rollout/tokens_per_second")):
                assert second[key] == pytest.approx(value, rel=1e-3, abs=1e-6), (case, key)


def records(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "changes"),
    [
        ({"two": CPU_2, "fsdp": FSDP_2}, {}),
        ({"three": CPU_3}, {"prompts_per_step": 2, "tokens_per_batch": 40}),  # the third rank has nothing to train
        ({"two": CPU_2, "fsdp": FSDP_2}, LORA),
        ({"two": CPU_2}, {"rollout.max_staleness": 1}),
    ],
    ids=["full", "idle rank", "lora", "sampled ahead"],
)
def test_any_number_of_processes_does_the_same(
    tmp_path: Path, cases: dict[str, list[str]], changes: dict[str, object]
) -> None:
    """Uneven lengths, 5 prompts over 2 ranks (2 over 3), uneven micro-batches: same groups, rewards, advantages, metrics
    and weights; evaluation counts each of 11 items once."""
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl", rows=11)
    one = launch(tmp_path, "one", [sys.executable], **changes)
    assert one.returncode == 0, one.stderr
    expected = load_file(tmp_path / "one" / "final" / "model.safetensors")
    start = load_file(tmp_path / "model" / "model.safetensors")
    assert any(not torch.allclose(expected[key], start[key]) for key in start)
    for case, launcher in cases.items():
        result = launch(tmp_path, case, launcher, **changes)
        assert (tmp_path / case / "final").is_dir(), result.stderr
        assert ("(FSDP)" if case == "fsdp" else "(MULTI_CPU)") in result.stdout + result.stderr
        same_run(tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_fsdp_computes_in_bfloat16_what_ddp_does(tmp_path: Path, changes: dict[str, object]) -> None:
    """Float32 masters, head, logprobs and sums over ranks; bfloat16 where autocast takes it: with and without shards."""
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl", rows=11)
    for run, name in (("one", "cpu_2proc"), ("fsdp", "fsdp2")):
        flags = ("--num_processes", "2", "--mixed_precision", "bf16")
        result = launch(tmp_path, run, profile(name, *flags), **changes)
        assert (tmp_path / run / "final").is_dir(), result.stderr
        assert "bf16 precision" in result.stdout + result.stderr
    same_run(tmp_path, "fsdp")


@pytest.mark.slow
def test_two_machines_do_the_same(tmp_path: Path) -> None:
    """multi_node_fsdp2.yaml, one launcher per machine, both on this one: they find each other at an address and a port."""
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl", rows=11)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--num_machines", "2", "--num_processes", "2", "--mixed_precision", "no"]
    flags += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--machine_rank"]
    with ThreadPoolExecutor() as machines:
        starts = [
            machines.submit(launch, tmp_path, "hosts", profile("multi_node_fsdp2", *flags, str(rank)))
            for rank in (0, 1)
        ]
        ends = [start.result() for start in starts]
    assert (tmp_path / "hosts" / "final").is_dir(), [end.stderr[-2000:] for end in ends]
    assert re.search(r"2 process\(es\) on cpu\S* \(FSDP\)", ends[0].stdout + ends[0].stderr)
    one = launch(tmp_path, "one", [sys.executable])
    assert one.returncode == 0, one.stderr
    same_run(tmp_path, "hosts")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs pip install deepspeed==0.19.8")
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_zero_does_the_same_and_resumes(tmp_path: Path, stage: int, changes: dict[str, object]) -> None:
    """DeepSpeed over gloo on two CPU ranks; the checkpoint of its first step, gone on with, ends in the same weights."""
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl", rows=11)
    fixed = {"save_every": 1, "save_total_limit": 9, "optimizer.lr_scheduler_type": "constant"} | changes
    one = launch(tmp_path, "one", [sys.executable], **fixed)
    assert one.returncode == 0, one.stderr
    result = launch(tmp_path, "zero", zero(stage), **fixed)
    assert (tmp_path / "zero" / "final").is_dir(), result.stderr[-3000:]
    assert "(DEEPSPEED)" in result.stdout + result.stderr
    same_run(tmp_path, "zero")
    first = tmp_path / "zero" / "checkpoints" / "step-1"
    resumed = launch(tmp_path, "resumed", zero(stage), resume=first, **fixed)
    assert (tmp_path / "resumed" / "final").is_dir(), resumed.stderr[-3000:]
    expected = load_file(tmp_path / "zero" / "final" / "model.safetensors")
    weights = load_file(tmp_path / "resumed" / "final" / "model.safetensors")
    assert all(torch.allclose(weights[key], expected[key], rtol=0, atol=1e-6) for key in expected)


@pytest.mark.slow
def test_the_main_process_reads_the_weights_for_all(tmp_path: Path) -> None:
    """FSDP2 on two ranks, a bfloat16 file with a tied head: shards, reference, sampler, buffers, and logprobs of full and LoRA are
    to the bit what every process reading for itself gives; the second rank comes to hold its shard, never the whole model."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "tie_word_embeddings": True}
    folder = tiny_folder(tmp_path / "model", **shape)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    command = [*FSDP_2, str(ROOT / "tests/sharded_load.py"), str(folder), str(tmp_path / "rank")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert (tmp_path / "rank-1.json").is_file(), result.stderr
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        print(
            {way: {key: value for key, value in rank[way].items() if "peak" in key} for way in ("once", "everywhere")}
        )
        assert rank["asked"]  # by fsdp2.yaml
        assert rank["once"]["reads_once"] and not rank["everywhere"]["reads_once"]
        assert rank["once"]["weights"] and rank["everywhere"]["weights"]
        for case in ("full", "lora"):
            for what in ("", " reference", " sampler", " buffers"):
                assert rank["once"][case + what] == rank["everywhere"][case + what], case + what
    whole, (_, second) = ranks[0]["whole"], ranks
    assert second["everywhere"]["held"] == whole and second["once"]["held"] == 0
    assert second["everywhere"]["peak of loading"] > 0.9 * whole
    assert second["once"]["peak of loading"] < 0.1 * whole
    assert second["once"]["peak of sharding"] < 0.75 * whole  # half is its shard


@pytest.mark.slow
def test_a_model_that_the_main_process_cannot_read_is_refused_by_all(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl")
    (tmp_path / "model" / "model.safetensors").unlink()
    refused = launch(tmp_path, "run", FSDP_2)
    assert refused.returncode != 0
    assert "cannot be loaded" in refused.stderr and "Traceback" not in refused.stderr.split("cannot be loaded")[0]


@pytest.mark.slow
def test_a_sharded_run_resumes_exactly_and_alone(tmp_path: Path) -> None:
    """FSDP2 on two ranks, stopped and resumed on two; then on one process without FSDP, and the other way round: the checkpoint is
    whole, and no moment is lost."""
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl", rows=11)
    fixed = {"save_every": 1, "optimizer.lr_scheduler_type": "constant", "eval_every": 0}
    launch(tmp_path, "whole", FSDP_2, **fixed)
    expected = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    alone = [sys.executable]
    for before, after, tolerance in ((FSDP_2, FSDP_2, 0.0), (FSDP_2, alone, 1e-5), (alone, FSDP_2, 1e-5)):
        run = f"part-{before is alone}-{after is alone}"
        launch(tmp_path, run, before, steps=1, **fixed)
        result = launch(tmp_path, run, after, resume="auto", **fixed)
        assert "resuming from" in result.stdout + result.stderr, result.stderr
        weights = load_file(tmp_path / run / "final" / "model.safetensors")
        for key in expected:
            assert torch.allclose(weights[key], expected[key], rtol=0, atol=tolerance), key


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_weights_that_stay_in_the_machines_memory_learn_the_same(tmp_path: Path, changes: dict[str, object]) -> None:
    """fsdp_offload_params: FSDP2's shards, gradients and moments on the CPU. What one process trains; its first checkpoint, gone on
    with, ends in the same weights to the bit."""
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl", rows=11)
    fixed = {"save_every": 1, "save_total_limit": 9, "optimizer.lr_scheduler_type": "constant"} | changes
    one = launch(tmp_path, "one", [sys.executable], **fixed)
    assert one.returncode == 0, one.stderr
    result = launch(tmp_path, "offloaded", OFFLOADED, **fixed)
    assert (tmp_path / "offloaded" / "final").is_dir(), result.stderr
    assert "(FSDP)" in result.stdout + result.stderr
    same_run(tmp_path, "offloaded")
    first = tmp_path / "offloaded" / "checkpoints" / "step-1"
    resumed = launch(tmp_path, "resumed", OFFLOADED, resume=first, **fixed)
    assert (tmp_path / "resumed" / "final").is_dir(), resumed.stderr
    expected = load_file(tmp_path / "offloaded" / "final" / "model.safetensors")
    weights = load_file(tmp_path / "resumed" / "final" / "model.safetensors")
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [FSDP_2, OFFLOADED], ids=["sharded", "offloaded"])
def test_the_main_process_reads_a_checkpoint_for_all(tmp_path: Path, launcher: list[str]) -> None:
    """FSDP2 on two ranks, a step, a checkpoint, and new policies that take it: weights, moments and a synced reference are to the
    bit what was saved; the second rank comes to hold its shard of the moments, never the checkpoint."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    folder = tiny_folder(tmp_path / "model", **shape)
    command = [*launcher, str(ROOT / "tests/sharded_resume.py"), str(folder), str(tmp_path / "rank")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert (tmp_path / "rank-1.json").is_file(), result.stderr
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    print({case: [rank[case] for rank in ranks] for case in ("full", "lora")})
    for case in ("full", "lora"):
        main, second = (rank[case] for rank in ranks)
        assert main["offloaded"] == second["offloaded"] == (launcher is OFFLOADED)
        assert main["moved"] > 0  # the step changed weights: a load that did nothing would be seen
        assert main["tensors"] == main["equal"] > 0
        assert main["reference"] == second["reference"] == main["reference saved"]
    main, second = ranks[0]["full"], ranks[1]["full"]
    assert main["read"] == main["checkpoint"] and second["read"] == 0
    assert main["peak"] > main["checkpoint"] and second["peak"] < 0.6 * main["checkpoint"]  # a quarter are its moments


@pytest.mark.slow
def test_a_checkpoint_that_the_main_process_cannot_read_is_refused_by_all(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl", rows=11)
    launch(tmp_path, "run", FSDP_2, steps=1, save_every=1, eval_every=0)
    first = tmp_path / "run" / "checkpoints" / "step-1"
    content = bytearray((first / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (first / "optimizer.safetensors").write_bytes(content)
    refused = launch(tmp_path, "again", FSDP_2, resume=first, eval_every=0)
    assert refused.returncode != 0
    assert refused.stderr.count("are not the ones that were written") == 2  # both ranks say so, and none waits
    assert "Traceback" not in refused.stderr.split("are not the ones that were written")[0]


@pytest.mark.slow
def test_one_collective_per_log_not_one_per_metric(tmp_path: Path) -> None:
    """Two gloo ranks: four rewards, which are eight metrics more than one, take the same collectives in every step, and one of
    them carries all the sums of the log."""
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl")
    four = {f"{tmp_path}/lengths.py:{name}": 1.0 for name in "abcd"}
    (tmp_path / "lengths.py").write_text(
        "".join(
            f"def {name}(completions, **rest):\n    return [1.0 * len(str(c)) for c in completions]\n"
            for name in "abcd"
        )
    )
    found = {}
    for run, rewards in (("one", dict([next(iter(four.items()))])), ("four", four)):
        (tmp_path / run).mkdir()
        result = launch(
            tmp_path, run, CPU_2, "tests/counted_train.py", rewards=json.dumps(rewards), **{"scoring.workers": 0}
        )
        assert (tmp_path / run / "final").is_dir(), result.stderr
        ranks = [records(tmp_path / run, f"rank-{rank}") for rank in (0, 1)]
        assert ranks[0] == ranks[1]
        found[run] = [row for row in ranks[0] if row["step"] == 2]
    kinds = {run: [row["kind"] for row in rows] for run, rows in found.items()}
    print(found)
    assert kinds["one"] == kinds["four"]
    wide = {run: [row["numbers"] for row in rows if (row["numbers"] or 0) > 2] for run, rows in found.items()}
    assert len(wide["one"]) == len(wide["four"]) == 1
    logged = {run: len(records(tmp_path / run, "metrics")[1]) for run in found}
    assert logged["four"] >= logged["one"] + 6


@pytest.mark.slow
def test_fewer_processes_than_asked_for_are_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl")
    refused = launch(tmp_path, "run", [*ACCELERATE, "--cpu", "--num_processes", "2"])
    assert "2 processes were asked for, 1 started" in refused.stderr
    assert refused.returncode != 0


def test_an_optimizer_that_the_schedule_would_not_reach_is_refused() -> None:
    settings: dict[str, Any] = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=settings))
    )
    with pytest.raises(ConfigError, match="offload_optimizer_device is cpu"):
        configure(accelerator, 1.0)
    settings["zero_optimization"]["offload_optimizer"]["device"] = "none"
    configure(accelerator, 1.0)
    assert settings["gradient_clipping"] == 1.0


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what accelerate launch sets when nobody chose
    assert cpu_threads(1) == cores
    assert cpu_threads(cores) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpu_threads(2) == 3
