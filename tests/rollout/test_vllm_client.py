"""The vLLM engine with a stand-in for the server (tests/fake_vllm.py). Real vLLM: tests/rollout/test_vllm.py."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from grpo.config.parser import load_config
from grpo.config.schema import RolloutConfig
from grpo.errors import ConfigError, EngineError, NumericsError
from grpo.models.logprob_model import LogprobModel, probe_batch
from grpo.rollout import vllm_client
from grpo.rollout.engine import build_engine, correction_of
from grpo.rollout.logprob_mismatch import scale
from grpo.rollout.vllm_client import Server, WeightSender, check_server, check_version, forget_prefixes
from grpo.rollout.vllm_colocate import vllm_module
from grpo.run.checkpoint import newest_valid
from grpo.tools.vllm_server import server_command
from grpo.trainer import train
from grpo.types import Prompt, SamplingPlan
from tests.fake_vllm import FakeVLLM
from tests.fakes import CharTokenizer, tiny_folder, tiny_model
from tests.runtime.test_signals import same_weights
from tests.test_trainer import arguments, run


@pytest.fixture
def fake() -> Iterator[FakeVLLM]:
    with FakeVLLM() as server:
        yield server


def test_a_server_that_is_not_there_or_not_for_training(fake: FakeVLLM) -> None:
    with pytest.raises(ConfigError, match=r"no vLLM server answers at http://127.0.0.1:9 .*launch/vllm_server.py"):
        check_server(Server("http://127.0.0.1:9", 0.1), None)
    fake.fails["/weight_info"] = 404
    with pytest.raises(ConfigError, match="has no /weight_info: it was not started for training"):
        check_server(Server(fake.url, 5), None)
    fake.fails.clear()
    assert check_server(Server(fake.url, 5), 4096) == "the-model"
    with pytest.raises(ConfigError, match=r"room for 4096 tokens.* is 5000: start it with --max-model-len 5000"):
        check_server(Server(fake.url, 5), 5000)


def test_proxies_of_the_environment_are_not_asked(fake: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert check_server(Server(fake.url, 5), 4096) == "the-model"
    assert Server(fake.url, 5).ask_all("/v1/models", []) == []
    with pytest.raises(EngineError, match="as asked"):  # asked, and answered
        fake.fails["/v1/completions"] = 400
        Server(fake.url, 5).ask_all("/v1/completions", [{"prompt": [1]}])


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (500, r"failed \(/v1/completions: as asked\)"),
        (400, r"refused /v1/completions \(400\): as asked"),
        ("drop", "died or does not answer"),
    ],
)
def test_a_question_that_gets_no_answer(fake: FakeVLLM, failure: object, message: str) -> None:
    fake.fails["/v1/completions"] = failure
    with pytest.raises(EngineError, match=message) as caught:
        Server(fake.url, 5).ask_all("/v1/completions", [{"prompt": [1]}] * 3)
    assert caught.value.exit_code == 7


def test_an_answer_may_take_long_but_not_from_a_dead_server(fake: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client, "LOOK_EVERY", 0.05)
    fake.fails |= {"/v1/completions": "hang", "/health": "hang"}
    with pytest.raises(EngineError, match=r"died or does not answer \(/health: ReadTimeout"):
        Server(fake.url, 0.3).ask_all("/v1/completions", [{}])


def test_a_cache_that_is_not_reset_and_weights_of_somebody_else(
    fake: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_client.time, "sleep", lambda seconds: None)
    answers = iter([False, True])
    forget_prefixes(lambda: next(answers))
    with pytest.raises(EngineError, match="did not reset its prefix cache"):
        forget_prefixes(lambda: False)
    with pytest.raises(EngineError, match="holds weights 'as started', not 'mine'"):
        check_version(Server(fake.url, 5), "mine")


def test_weights_travel_in_parcels(fake: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client, "PARCEL_BYTES", 100)
    sender = WeightSender(Server(fake.url, 20), "gloo", torch.device("cpu"))
    weights = {
        "a": torch.randn(5, 6).T,  # not contiguous
        "b": torch.randn(3).to(torch.bfloat16),
        "c": torch.randn(2, 2),
    }
    sender.send(iter(weights.items()), "1")
    assert fake.version == "1" and fake.received.keys() == weights.keys()
    assert all(torch.equal(fake.received[name], tensor) for name, tensor in weights.items())
    paths = [path for path, _ in fake.asked]
    assert paths.count("/update_weights") == 2  # a is more than 100 bytes; b and c are sent together
    assert paths.index("/start_weight_update") < paths.index("/update_weights") < paths.index("/finish_weight_update")
    assert paths[-2:] == ["/reset_prefix_cache", "/weight_info"]
    fake.fails["/update_weights"] = 500
    with pytest.raises(EngineError, match="as asked"):  # at once: nobody waits for a broadcast that has no receiver
        sender.send(iter(weights.items()), "2")


@pytest.mark.slow
def test_a_refused_update_does_not_hold_the_program_up(fake: FakeVLLM) -> None:
    """The server answers with an error and its worker does not join, so the broadcast would wait forever."""
    fake.fails["/update_weights"] = 500
    program = f"""
import sys, torch
from grpo.errors import EngineError
from grpo.rollout.vllm_client import Server, WeightSender
sender = WeightSender(Server({fake.url!r}, 600.0), "gloo", torch.device("cpu"))
try:
    sender.send([("weight", torch.zeros(20_000_000)), ("bias", torch.zeros(10))], "step-1")
except EngineError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 7, ended.stderr
    assert "/update_weights: as asked" in ended.stdout


def test_the_engine_agrees_with_the_native_one(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    other = tiny_model(seed=5, vocab_size=42, spread=2.0)  # not the weights that the server starts with
    prompts = [Prompt(3, "", (5, 6, 7)), Prompt(4, "", (9,) * 20)]
    with FakeVLLM(tmp_path) as server:
        config = RolloutConfig(
            engine="vllm", vllm_mode="server", vllm_server_base_url=server.url, vllm_server_timeout=20
        )
        engine = build_engine(
            "vllm",
            other,
            CharTokenizer(),
            slots=8,
            uses_packed_attention=True,
            config=config,
            accelerator=Accelerator(cpu=True),
            weights=other.named_parameters,
        )
        engine.update_weights(0)
        native = build_engine("native", other, CharTokenizer(), slots=8, uses_packed_attention=True)
        greedy = SamplingPlan(3, 10, 0.0, 0)
        expected, found = native.generate(prompts, greedy), engine.generate(prompts, greedy)
        assert [[c.token_ids for c in g.completions] for g in found] == [
            [c.token_ids for c in g.completions] for g in expected
        ]
        sampled = SamplingPlan(3, 10, 0.7, 1)
        first, second = engine.generate(prompts, sampled), engine.generate(prompts[1:], sampled)
        assert first[1] == second[0]  # whatever it is sampled beside
        assert len({tuple(c.token_ids) for c in first[0].completions}) == 3
        server.fails["/v1/completions"] = "drop"
        with pytest.raises(EngineError, match="died"):
            engine.generate(prompts, sampled)
        server.fails.clear()
        with pytest.raises(EngineError, match="died"):  # for good: its weights may be gone
            engine.generate(prompts, sampled)


def settings(server: FakeVLLM) -> dict[str, object]:
    return {
        "rollout.engine": "vllm",
        "rollout.vllm_mode": "server",
        "rollout.vllm_server_base_url": server.url,
        "rollout.vllm_server_timeout": 20,
        "data.max_prompt_length": 64,
        "scoring.workers": 0,
        "eval_every": 2,
        "save_every": 0,
    }


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a training whose server stays alive. Return its folder "whole", with model and data beside it."""
    folder = tmp_path_factory.mktemp("vllm")
    arguments(folder, "none")  # makes model and data
    with FakeVLLM(folder / "model") as server:
        rows = run(folder, "whole", **settings(server))
    assert all(row["policy/sampling_logprob_difference"] < 1e-5 for row in rows[1:])
    return folder


DEATHS = {"sampling": "/v1/completions", "evaluation": "/v1/completions", "update": "/update_weights"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "when", ["sampling", *(pytest.param(n, marks=pytest.mark.slow) for n in ("evaluation", "update"))]
)
def test_a_server_that_dies_leaves_a_checkpoint_that_goes_on_exactly(
    whole_run: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    with FakeVLLM(whole_run / "model") as server:
        original = server.answer

        def dies(path: str, body: object) -> object:
            updates = sum(path == "/update_weights" for path, _ in server.asked)
            greedy = isinstance(body, dict) and body.get("temperature") == 0
            # two updates before training (one of them with changed weights), one after each step
            if updates >= 4 and path == DEATHS[when] and (when != "evaluation" or greedy):
                server.fails |= {"/v1/completions": "drop", "/weight_info": "drop"}
                raise ConnectionError
            return original(path, body)

        monkeypatch.setattr(server, "answer", dies)
        monkeypatch.setattr(server.http, "handle_error", lambda *_: None)
        with pytest.raises(EngineError, match=r"(died|did not reach).* of 4 steps are done.*--resume auto") as caught:
            train(load_config(arguments(whole_run, when, **settings(server))))
        assert caught.value.exit_code == 7
    newest, _ = newest_valid(whole_run / when)
    assert newest is not None and newest.name in ("step-2", "step-3")
    with FakeVLLM(whole_run / "model") as server:
        run(whole_run, when, resume="auto", **settings(server))
    assert same_weights(whole_run / when, whole_run / "whole")
    both = [(whole_run / name / "rollouts.jsonl").read_text().splitlines() for name in (when, "whole")]
    assert [json.loads(row)["completion"] for row in both[0]] == [json.loads(row)["completion"] for row in both[1]]


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_changed_weights_show_each_one_that_was_forgotten(family: str) -> None:
    batch = probe_batch(40)

    def logprobs(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return LogprobModel(model, uses_packed_attention=True, temperature=1.0)(batch)[0]  # type: ignore[arg-type]

    model = tiny_model(family, spread=2.0, tie_word_embeddings=True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scale(model, 2.0)
    changed = logprobs(model)
    shown = {}
    for name, parameter in model.named_parameters():
        new = parameter.clone()
        with torch.no_grad():
            parameter.copy_(before[name])
            shown[name] = float((logprobs(model) - changed).abs().mean())
            parameter.copy_(new)
    # A bias is 0 in a new model, and stays 0 when it is scaled.
    assert {name for name, by in shown.items() if by < 0.01} == {name for name in shown if name.endswith("bias")}
    scale(model, 0.5)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_server_that_loses_weights_is_found_out_at_the_start(tmp_path: Path) -> None:
    arguments(tmp_path, "none")  # makes model and data
    with FakeVLLM(tmp_path / "model") as server:
        server.lose = "layers.1.self_attn.v_proj"
        with pytest.raises(NumericsError, match="did not take over all new weights") as caught:
            train(load_config(arguments(tmp_path, "run", **settings(server))))
    assert caught.value.exit_code == 4


@pytest.mark.slow
def test_updates_that_stop_arriving_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments(tmp_path, "none")  # makes model and data
    with FakeVLLM(tmp_path / "model") as server:
        original = server.answer

        def deaf(path: str, body: object) -> object:
            updates = sum(path == "/finish_weight_update" for path, _ in server.asked)
            server.lose = "model" if updates > 2 else None  # says yes to everything, and keeps its weights
            return original(path, body)

        monkeypatch.setattr(server, "answer", deaf)
        with pytest.raises(NumericsError, match="in step 2 .*sampled with other weights than the trainer's"):
            train(load_config(arguments(tmp_path, "run", **settings(server))))


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ConfigError, match="vLLM is not in this environment.*--rollout.vllm_mode server"):
        vllm_module()


def test_the_launch_line_has_what_training_needs() -> None:
    words = server_command(["--model", "m", "--port", "8001", "--tensor-parallel-size", "2"])
    told = dict(zip(words, words[1:], strict=False))
    assert told["--logprobs-mode"] == "processed_logprobs" and told["--generation-config"] == "vllm"
    assert told["--worker-extension-cls"] == "grpo.rollout.vllm_worker.Extension"
    assert json.loads(told["--weight-transfer-config"]) == {"backend": "grpo"}
    assert told["--port"] == "8001" and told["--tensor-parallel-size"] == "2"


def test_correction_is_on_where_another_engine_samples() -> None:
    assert correction_of(RolloutConfig()) == "none"
    assert correction_of(RolloutConfig(engine="vllm")) == "truncate"
    assert correction_of(RolloutConfig(engine="vllm", correction="none")) == "none"
