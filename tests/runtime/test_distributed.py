"""Runs of several processes: the same groups, rewards, metrics and weights as one process with the same seed."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.fakes import tiny_data, tiny_folder

ROOT = Path(__file__).parents[2]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


@dataclass(frozen=True)
class Ended:
    """Folder, exit code and output of a finished run."""

    folder: Path
    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        path = self.folder / "final" / "model.safetensors"
        assert path.is_file(), self.stderr[-3000:]
        return load_file(path)

    def records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]

    def equals(self, other: "Ended", tolerance: float = 0.0) -> bool:
        """Return the final weights of the two runs."""
        mine, theirs = self.weights, other.weights
        return mine.keys() == theirs.keys() and all(
            torch.allclose(mine[key], theirs[key], rtol=0, atol=tolerance) for key in theirs
        )


def launch(place: Path, run: str, launcher: list[str], script: str = "launch/train.py", **changes: object) -> Ended:
    """Train in place/run with the model and the data in `place`."""
    settings = {
        "model.name": place / "model",
        "data.path": place / "data.jsonl",
        "data.eval_path": place / "data.jsonl",
        "data.system_prompt": "null",
        "run_dir": place / run,
        "steps": 3,
        "prompts_per_step": 5,
        "sampling.num_generations": 4,
        "sampling.max_completion_length": 8,
        "optimizer.learning_rate": 0.001,
        "tokens_per_batch": 64,
        "data.max_prompt_length": 16,
        "eval_every": 3,
        "save_every": 1,
        "save_total_limit": 9,
        "tracking.report_to": "[]",
        "tracking.report": "false",
        "rewards": '{"tests.letters:count_letters": 1.0}',
    } | changes
    flags = [f"--{key}={value}" for key, value in settings.items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLLECTIVES": str(place / run)}
    if len(launcher) > 1 and "--main_process_port" not in launcher:  # two that look for one at once find the same
        launcher = [*launcher, "--main_process_port", "0"]
    command = [*launcher, str(ROOT / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    return Ended(place / run, done.returncode, done.stdout, done.stderr)


def profile(name: str, *flags: str) -> list[str]:
    return [*ACCELERATE, "--config_file", str(ROOT / "accelerate_configs" / f"{name}.yaml"), *flags]


CPU_2 = profile("cpu_2proc")
CPU_3 = profile("cpu_2proc", "--num_processes", "3")
FSDP_2 = profile("fsdp2", "--num_processes", "2", "--mixed_precision", "no")
OFFLOADED = [*FSDP_2, "--fsdp_offload_params", "true"]
LORA = {"lora.r": 4, "lora.target_modules": "[q_proj, down_proj]"}


def zero(stage: int) -> list[str]:
    return profile(f"deepspeed_zero{stage}", "--num_processes", "2", "--mixed_precision", "no")


CASES = {
    "one": [sys.executable],
    "two": CPU_2,
    "three": CPU_3,
    "fsdp": FSDP_2,
    "offloaded": OFFLOADED,
    "zero2": zero(2),
    "zero3": zero(3),
    "two in bfloat16": profile("cpu_2proc", "--num_processes", "2", "--mixed_precision", "bf16"),
    "fsdp in bfloat16": profile("fsdp2", "--num_processes", "2", "--mixed_precision", "bf16"),
}


class Runs:
    """Runs shared by tests, which only read them. Each is launched for the first test that needs it, two at a time."""

    def __init__(self, place: Path, pool: ThreadPoolExecutor) -> None:
        tiny_folder(place / "model")
        tiny_data(place / "data.jsonl", rows=11)
        self.place, self.pool = place, pool
        self.started: dict[str, Future[Ended]] = {}

    def __call__(self, *cases: str, **changes: object) -> list[Ended]:
        names = {case: f"{case} {json.dumps(changes)}" for case in cases}
        for case, name in names.items():
            if name not in self.started:
                run = f"{len(self.started)} {case}"
                self.started[name] = self.pool.submit(launch, self.place, run, CASES[case], **changes)
        return [self.started[name].result() for name in names.values()]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Run two launches at a time, because the imports of one use a single core for seconds."""
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, pool: ThreadPoolExecutor) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), pool)


def same_run(one: Ended, other: Ended) -> None:
    """Check that two runs have the same completions, rewards, weights and metrics."""
    case = other.folder.name
    expected, weights = one.weights, other.weights
    for first, second in zip(one.records("rollouts"), other.records("rollouts"), strict=True):
        for key in ("step", "draw", "sample", "completion", "reward", "length"):
            assert first[key] == second[key], (case, key)
        assert abs(first["advantage"] - second["advantage"]) < 1e-9
    assert weights.keys() == expected.keys()
    for key in expected:
        assert torch.allclose(weights[key], expected[key], rtol=1e-5, atol=1e-5), (case, key)
    for first, second in zip(one.records("metrics"), other.records("metrics"), strict=True):
        for key, value in first.items():
            if not key.startswith(("time/", "memory/", "rollout/tokens_per_second")):
                assert second[key] == pytest.approx(value, rel=1e-3, abs=1e-6), (case, key)


def stopped_after_a_step(run: Ended, folder: Path) -> None:
    """Copy the run as if it was killed before its second checkpoint, after the records of that step."""
    shutil.copytree(run.folder, folder)
    for later in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"step-{later}")
    shutil.rmtree(folder / "final")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "changes"),
    [
        (["two", "fsdp"], {}),
        (["three"], {"prompts_per_step": 2, "tokens_per_batch": 40}),  # the third rank has nothing to train
        (["two", "fsdp"], LORA),
        (["two"], {"rollout.max_staleness": 1}),
        (["two", "fsdp"], {"tokens_per_batch": 256}),
        (["two", "fsdp", "three"], {"objective.mini_batches": 2, "objective.num_iterations": 2}),
    ],
    ids=["full", "idle rank", "lora", "sampled ahead", "large batches", "mini-batches"],
)
def test_any_number_of_processes_does_the_same(runs: Runs, cases: list[str], changes: dict[str, object]) -> None:
    """Uneven lengths, 5 prompts on 2 ranks (2 on 3), uneven micro-batches: same groups, rewards, advantages, metrics
    and weights. Evaluation counts each of 11 items once.
    """
    one, *others = runs("one", *cases, **changes)
    assert one.code == 0, one.stderr
    start = load_file(runs.place / "model" / "model.safetensors")
    assert any(not torch.allclose(one.weights[key], start[key]) for key in start)
    for case, other in zip(cases, others, strict=True):
        same_run(one, other)
        assert ("(FSDP)" if case == "fsdp" else "(MULTI_CPU)") in other.output


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_fsdp_computes_in_bfloat16_what_ddp_does(
    runs: Runs, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 masters, head, logprobs and sums over ranks, bfloat16 in autocast, with and without shards.

    Both run the model's own modules: kernels round bfloat16 in other places, and FSDP2 does not use them.
    """
    monkeypatch.setenv("GRPO_KERNELS", "torch")
    both = runs("two in bfloat16", "fsdp in bfloat16", **changes)
    same_run(*both)
    assert all("), bfloat16" in run.output for run in both)


@pytest.mark.slow
def test_two_machines_do_the_same(runs: Runs) -> None:
    """multi_node_fsdp2.yaml with two launchers on this machine, which connect at an address and a port."""
    [one] = runs("one")
    assert one.code == 0, one.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--num_machines", "2", "--num_processes", "2", "--mixed_precision", "no"]
    flags += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--machine_rank"]
    machines = [profile("multi_node_fsdp2", *flags, rank) for rank in "01"]
    report = {"tracking.report": "true"}
    starts = [runs.pool.submit(launch, runs.place, "hosts", machine, **report) for machine in machines]
    main, second = (start.result() for start in starts)
    assert (main.folder / "final").is_dir(), [main.stderr[-2000:], second.stderr[-2000:]]
    assert "2 processes on CPU (FSDP), float32" in main.output
    assert (main.folder / "report.md").is_file()
    same_run(one, main)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs pip install deepspeed==0.19.8")
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_zero_does_the_same_and_resumes(runs: Runs, stage: int, changes: dict[str, object]) -> None:
    """DeepSpeed over gloo on two CPU ranks; a run resumed after its first step ends in the same weights."""
    one, sharded = runs("one", f"zero{stage}", **changes)
    assert one.code == 0, one.stderr
    same_run(one, sharded)
    assert "(DEEPSPEED)" in sharded.output
    [resumed] = runs(f"zero{stage}", resume=str(sharded.folder / "checkpoints" / "step-1"), **changes)
    assert resumed.equals(sharded, tolerance=1e-6)


@pytest.mark.slow
def test_the_main_process_reads_the_weights_for_all(tmp_path: Path) -> None:
    """FSDP2 on two ranks, a bfloat16 file with a tied head: shards, reference, sampler, buffers and logprobs, full and
    LoRA, equal to the bit those of processes that all read the file. The second rank never holds the whole model."""
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
    assert second["once"]["peak of sharding"] < 1.75 * whole  # half is its shard, and as much each of its two moments


@pytest.mark.slow
def test_a_model_that_the_main_process_cannot_read_is_refused_by_all(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl")
    (tmp_path / "model" / "model.safetensors").unlink()
    refused = launch(tmp_path, "run", FSDP_2)
    assert refused.code != 0
    assert "cannot be loaded" in refused.stderr and "Traceback" not in refused.stderr.split("cannot be loaded")[0]


@pytest.mark.slow
def test_a_sharded_run_resumes_exactly_and_alone(runs: Runs) -> None:
    """FSDP2 on two ranks, stopped and resumed on two; then on one process without FSDP, and the other way round: the
    checkpoint is whole, and no moment is lost."""
    alone, whole = runs("one", "fsdp")
    ways = {"sharded": (whole, "fsdp", 0.0), "alone": (whole, "one", 1e-5), "sharded again": (alone, "fsdp", 1e-5)}
    starts = {}
    for run, (before, after, _) in ways.items():
        stopped_after_a_step(before, runs.place / run)
        starts[run] = runs.pool.submit(launch, runs.place, run, CASES[after], resume="auto")
    for run, (_, _, tolerance) in ways.items():
        resumed = starts[run].result()
        assert re.search("resuming from .*: 1 of 3 steps are done", resumed.output), resumed.stderr
        assert resumed.equals(whole, tolerance), run


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_weights_that_stay_in_the_machines_memory_learn_the_same(runs: Runs, changes: dict[str, object]) -> None:
    """fsdp_offload_params, FSDP2's shards, gradients and moments on the CPU: same as one process, and a run resumed
    from its first checkpoint ends in the same weights to the bit.
    """
    one, offloaded = runs("one", "offloaded", **changes)
    assert one.code == 0, one.stderr
    same_run(one, offloaded)
    assert "(FSDP)" in offloaded.output
    [resumed] = runs("offloaded", resume=str(offloaded.folder / "checkpoints" / "step-1"), **changes)
    assert resumed.equals(offloaded)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [FSDP_2, OFFLOADED], ids=["sharded", "offloaded"])
def test_the_main_process_reads_a_checkpoint_for_all(tmp_path: Path, launcher: list[str]) -> None:
    """FSDP2 on two ranks, a step, a checkpoint, and new policies that load it: weights, moments and a synced reference
    equal to the bit what was saved. The second rank holds its shard of the moments, never the checkpoint."""
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
def test_a_checkpoint_that_the_main_process_cannot_read_is_refused_by_all(runs: Runs, tmp_path: Path) -> None:
    [whole] = runs("fsdp")
    first = tmp_path / "step-1"
    shutil.copytree(whole.folder / "checkpoints" / "step-1", first)
    content = bytearray((first / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (first / "optimizer.safetensors").write_bytes(content)
    refused = launch(runs.place, "refused", FSDP_2, resume=first)
    assert refused.code != 0
    assert refused.stderr.count("are not the ones that were written") == 2  # both ranks say so, and none waits
    assert "Traceback" not in refused.stderr.split("are not the ones that were written")[0]


@pytest.mark.slow
def test_one_collective_per_log_not_one_per_metric(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """Two gloo ranks: four rewards, eight more metrics than one, need the same collectives in every step, and one of
    them carries all sums of the log.
    """
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl")
    four = {f"{tmp_path}/lengths.py:{name}": 1.0 for name in "abcd"}
    (tmp_path / "lengths.py").write_text(
        "".join(
            f"def {name}(completions, **rest):\n    return [1.0 * len(str(c)) for c in completions]\n"
            for name in "abcd"
        )
    )
    starts = {}
    for run, rewards in (("one", dict([next(iter(four.items()))])), ("four", four)):
        (tmp_path / run).mkdir()
        changes = {"rewards": json.dumps(rewards), "scoring.workers": 0, "save_every": 0}
        starts[run] = pool.submit(launch, tmp_path, run, CPU_2, "tests/counted_train.py", **changes)
    ended = {run: start.result() for run, start in starts.items()}
    found = {}
    for run, end in ended.items():
        assert (end.folder / "final").is_dir(), end.stderr
        ranks = [end.records(f"rank-{rank}") for rank in (0, 1)]
        assert ranks[0] == ranks[1]
        found[run] = [row for row in ranks[0] if row["step"] == 2]
    kinds = {run: [row["kind"] for row in rows] for run, rows in found.items()}
    print(found)
    assert kinds["one"] == kinds["four"]
    wide = {run: [row["numbers"] for row in rows if (row["numbers"] or 0) > 2] for run, rows in found.items()}
    assert len(wide["one"]) == len(wide["four"]) == 1
    logged = {run: len(end.records("metrics")[1]) for run, end in ended.items()}
    assert logged["four"] >= logged["one"] + 6


@pytest.mark.slow
def test_fewer_processes_than_asked_for_are_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl")
    refused = launch(tmp_path, "run", [*ACCELERATE, "--cpu", "--num_processes", "2"])
    assert "2 processes were asked for, 1 started" in refused.stderr
    assert refused.code != 0
