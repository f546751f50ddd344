"""Real vLLM on a CPU: pytest -m vllm tests/rollout/test_vllm.py, in the environment of .ci/vllm_environment.sh.

All tests use one server, started as by a user, with dummy weights (--load-format dummy), so that correct results
prove the weight updates. The model's head is tied to its embeddings, which vLLM's CPU build does not update without
our fix.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from grpo.config.parser import load_config
from grpo.config.schema import RolloutConfig
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import EngineError
from grpo.experience import ExperienceCollector
from grpo.models.loading import load_model
from grpo.models.logprob_model import LogprobModel, use_grpo_attention
from grpo.packing import pack
from grpo.rollout.engine import build_engine
from grpo.rollout.vllm_client import Server
from grpo.run.checkpoint import newest_valid
from grpo.trainer import train
from grpo.types import Prompt, SamplingPlan
from tests.fakes import tiny_folder
from tests.test_trainer import arguments, run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
PATIENCE = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with "model" and "data.jsonl". vLLM's attention on a CPU needs heads of 32 or more."""
    folder = tmp_path_factory.mktemp("vllm")
    arguments(folder, "none")
    return tiny_folder(folder / "model", hidden_size=128, head_dim=32, tie_word_embeddings=True).parent


class Running:
    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "server.log"
        flags = ["--model", folder / "model", "--dtype", "float32", "--port", port, "--enforce-eager"]
        flags += ["--max-model-len", 256, "--max-num-seqs", 64]
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "vllm_server.py"), *map(str, flags)],
            env=ENVIRONMENT,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to the process group of the server and its workers, and wait until the server ends."""
        if self.process.poll() is None or number == signal.SIGKILL:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return
            self.process.wait(60)

    @property
    def settings(self) -> dict[str, object]:
        return COMMON | {"rollout.vllm_mode": "server", "rollout.vllm_server_base_url": self.url}


COMMON = {
    "rollout.engine": "vllm",
    "rollout.slots": 64,
    "rollout.vllm_server_timeout": PATIENCE,
    "data.max_prompt_length": 64,
    "scoring.workers": 0,
    "eval_every": 2,
    "save_every": 0,
    "steps": 3,
}


def serving(folder: Path) -> Iterator[Running]:
    """Start a server with the model in `folder`, wait until it answers, and stop it afterwards."""
    running = Running(folder)
    try:
        deadline = time.monotonic() + PATIENCE
        while not Server(running.url, 5)._alive():
            assert running.process.poll() is None and time.monotonic() < deadline, running.log.read_text()[-3000:]
            time.sleep(1)
        yield running
    finally:
        running.stop()
        time.sleep(2)
        running.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    yield from serving(folder)


def sane(rows: list[dict]) -> None:
    learned = [row for row in rows if "policy/loss" in row]
    assert len(learned) >= 2
    for row in learned:
        assert row["policy/sampling_logprob_difference"] < 1e-5
        assert 1 <= row["rollout/length_mean"] <= 8 and row["policy/grad_norm"] > 0
    assert abs(learned[0]["policy/kl"]) < 1e-6 < learned[-1]["policy/kl"]
    assert any("eval/accuracy" in row for row in rows)


def test_greedy_tokens_and_logprobs_follow_the_weights(folder: Path, server: Running) -> None:
    model, tokenizer = load_model(str(folder / "model")), load_tokenizer(str(folder / "model"))
    use_grpo_attention(model)
    engine = build_engine(
        "vllm",
        model,
        tokenizer,
        config=RolloutConfig(
            engine="vllm", vllm_mode="server", vllm_server_base_url=server.url, vllm_server_timeout=PATIENCE
        ),
        accelerator=Accelerator(cpu=True),
        weights=model.named_parameters,
    )
    native = build_engine("native", model, tokenizer, slots=16, uses_packed_attention=True)
    # The last one is long enough for the prefix cache, which must not survive an update.
    prompts = [Prompt(7, "", (5, 6, 7)), Prompt(8, "", (9, 3)), Prompt(9, "", tuple(2 + i % 40 for i in range(100)))]
    seen = []
    for step in range(3):
        if step:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * parameter.std().nan_to_num() * torch.randn_like(parameter))
        engine.update_weights(step)
        greedy = SamplingPlan(1, 12, 0.0, 0)
        expected = [group.completions[0] for group in native.generate(prompts, greedy)]
        found = [group.completions[0] for group in engine.generate(prompts, greedy)]
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        assert [one.ended for one in found] == [one.ended for one in expected]
        seen.append([one.token_ids for one in found])
        plan = SamplingPlan(4, 12, 0.7, step)
        groups = engine.generate(prompts, plan)
        (batch,) = pack(groups, torch.zeros(3, 4), max_tokens=10_000)
        with torch.no_grad():
            logprobs = LogprobModel(model, uses_packed_attention=True, temperature=0.7)(batch)[0]
        torch.testing.assert_close(batch.sampling_logprobs_N, logprobs, atol=1e-4, rtol=0)
        again = engine.generate(prompts[1:], plan)
        for one, other in zip(groups[1:], again, strict=True):  # by prompt and sample, whatever runs beside them
            assert [c.token_ids for c in one.completions] == [c.token_ids for c in other.completions]
        assert len({tuple(c.token_ids) for c in groups[2].completions}) > 1
    assert seen[0] != seen[1] != seen[2]


def test_a_run_with_a_server(folder: Path, server: Running) -> None:
    sane(run(folder, "server", **server.settings))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_samples_ahead(folder: Path, server: Running, processes: int) -> None:
    """Step 2 is sampled from the weights before step 1, as with the native engine, and beside the update."""
    name = f"ahead-{processes}"
    settings = server.settings | {"rollout.max_staleness": 1, "optimizer.learning_rate": 0.02, "steps": 4}
    flags = arguments(folder, name, **settings)
    command = [sys.executable, *(TWO if processes == 2 else []), str(ROOT / "launch" / "train.py"), *flags]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    assert (folder / name / "final").is_dir(), done.stderr[-3000:]
    rows = [row for row in metrics_of(folder / name) if "policy/loss" in row]
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 1, 1]
    differences = [row["policy/sampling_logprob_difference"] for row in rows]
    assert differences[0] < 1e-5 < min(differences[1:])  # an older policy has sampled
    if processes == 2:
        assert completions_of(folder / name) == completions_of(folder / "ahead-1")


def test_a_run_with_lora_sends_merged_weights(folder: Path, server: Running) -> None:
    sane(run(folder, "lora", **server.settings | {"lora.r": 4, "optimizer.learning_rate": 0.02}))


def test_a_server_that_another_run_has_taken_over(
    folder: Path, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = ExperienceCollector.sample, []

    def sample(*args: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            Server(server.url, 60).post("/update_weight_version", {"new_version": "somebody-else"})
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ExperienceCollector, "sample", sample)
    with pytest.raises(EngineError, match="holds weights 'somebody-else'.*1 of 3 steps are done"):
        train(load_config(arguments(folder, "taken", **server.settings)))


def test_an_update_that_a_trainer_did_not_live_to_finish(folder: Path, server: Running) -> None:
    Server(server.url, 60).post("/start_weight_update")
    sane(run(folder, "after-a-crash", **server.settings | {"steps": 2}))


def test_two_processes_sample_the_same(folder: Path, server: Running) -> None:
    flags = arguments(folder, "two", **server.settings | {"steps": 2})
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_2proc.yaml"), str(ROOT / "launch" / "train.py")]
    done = subprocess.run([*command, *flags], env=ENVIRONMENT, capture_output=True, text=True)
    assert (folder / "two" / "final").is_dir(), done.stderr[-3000:]
    first, second = (
        [json.loads(line) for line in (folder / name / "rollouts.jsonl").read_text().splitlines()]
        for name in ("server", "two")
    )
    first = [row for row in first if row["step"] <= 2]
    assert [row["completion"] for row in first] == [row["completion"] for row in second]


def test_a_server_that_is_killed(folder: Path, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test, because it kills the server."""
    original, calls = ExperienceCollector.sample, []

    def sample(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            server.stop(signal.SIGKILL)
        return original(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ExperienceCollector, "sample", sample)
        with pytest.raises(
            EngineError, match=r"died or does not answer.* 2 of 3 steps are done.*--resume auto"
        ) as caught:
            train(load_config(arguments(folder, "killed", **server.settings)))
    assert caught.value.exit_code == 7
    newest, _ = newest_valid(folder / "killed")
    assert newest is not None and newest.name == "step-2"
    rows = run(folder, "killed", resume="auto", **server.settings | {"rollout.engine": "native"})
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


PROGRAM = "from grpo.cli import main, run_main\n{code}\nrun_main(lambda: main(['train', *{flags!r}]))\n"
TWO = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu_2proc.yaml")]
TWO += ["--main_process_port", "0"]


def colocated(
    folder: Path, name: str, code: str = "", processes: int = 1, **changes: object
) -> subprocess.CompletedProcess:
    """In new processes, because vLLM changes its process permanently."""
    flags = arguments(folder, name, **COMMON | {"rollout.vllm_mode": "colocate"} | changes)
    script = folder / f"{name.replace(' ', '-')}.py"
    script.write_text(PROGRAM.format(code=code, flags=flags))
    command = [sys.executable, *(TWO if processes == 2 else []), str(script)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)


def completions_of(folder: Path, steps: int = 99) -> list[str]:
    rows = map(json.loads, (folder / "rollouts.jsonl").read_text().splitlines())
    return [row["completion"] for row in rows if row["step"] <= steps]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """A run with vLLM in its only process."""
    done = colocated(folder, "colocated")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "colocated"


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_vllm_in_the_same_process(alone: Path) -> None:
    sane(metrics_of(alone))


@pytest.mark.parametrize("size", [1, 2], ids=["an engine each", "an engine together"])
def test_two_processes_with_vllm_in_each_sample_the_same(folder: Path, alone: Path, size: int) -> None:
    """With tensor parallelism, each process holds half of vLLM's weights."""
    name = f"colocated-two-{size}"
    done = colocated(folder, name, processes=2, **{"rollout.vllm_tensor_parallel_size": size, "prompts_per_step": 3})
    assert (folder / name / "final").is_dir(), done.stderr[-3000:]
    sane(metrics_of(folder / name))
    one = colocated(folder, f"{name}-alone", **{"prompts_per_step": 3})
    assert one.returncode == 0, one.stderr[-3000:]
    assert completions_of(folder / name) == completions_of(folder / f"{name}-alone")


def test_a_part_of_vllm_for_each_process_and_no_sleep_on_a_cpu(folder: Path) -> None:
    for changes, message in (
        ({"rollout.vllm_tensor_parallel_size": 2}, "is 2, which does not divide the 1 processes of this run"),
        ({"rollout.vllm_enable_sleep_mode": True}, "which vLLM does not support on this device (cpu): set it to false"),
    ):
        done = colocated(folder, "refused", **changes)  # type: ignore[arg-type]
        assert done.returncode == 2 and message in done.stderr, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("vllm") is None, reason="needs a GPU, and vLLM")
def test_a_vllm_that_sleeps_during_updates_samples_the_same(folder: Path) -> None:
    for name, sleeps in (("awake", False), ("asleep", True)):
        done = colocated(folder, name, **{"rollout.vllm_enable_sleep_mode": sleeps})
        assert done.returncode == 0, done.stderr[-3000:]
    assert completions_of(folder / "asleep") == completions_of(folder / "awake")


def test_a_vllm_that_forgets_the_tied_head_is_found_out(folder: Path) -> None:
    """vLLM's CPU build without our fix: an update of this model succeeds, but its head does not change."""
    done = colocated(
        folder, "stock", "import grpo.rollout.vllm_worker\ngrpo.rollout.vllm_worker.register = lambda: None"
    )
    assert done.returncode == 4, done.stderr[-3000:]
    assert "did not take over all new weights" in done.stderr
