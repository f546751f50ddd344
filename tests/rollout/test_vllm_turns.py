"""Tools with real vLLM on a CPU, turn by turn: pytest -m vllm tests/rollout/test_vllm_turns.py (see test_vllm.py)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from grpo.config.schema import RolloutConfig
from grpo.data.tokenizer import load_tokenizer
from grpo.models.loading import load_model
from grpo.models.logprob_model import LogprobModel, use_grpo_attention
from grpo.packing import pack
from grpo.rollout.dialogue import Turns
from grpo.rollout.engine import build_engine, end_token_ids
from grpo.rollout.turn_rounds import TurnRounds, with_turns
from grpo.turns.calculator import calculator
from grpo.turns.workers import TurnWorkers
from grpo.types import Group, Prompt, SamplingPlan
from tests.compat.test_turns import call
from tests.fakes import tiny_model
from tests.rollout.test_vllm import PATIENCE, Running, colocated, metrics_of, serving
from tests.rollout.turns_tokenizer import SPECIAL, char_tokenizer
from tests.test_trainer import arguments, run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
LONGEST = 100
TOOLS = {
    "tools": "[calculator]",
    "turns.show_tools": "false",  # a prompt of characters would not fit into the server's contexts
    "turns.workers": 0,
    "sampling.max_completion_length": LONGEST,
    "rollout.correction": "null",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with "model" and "data.jsonl". The model has a token for each of some calls, and many ends."""
    folder = tmp_path_factory.mktemp("vllm-turns")
    arguments(folder, "none")
    tokenizer = char_tokenizer(special=[*SPECIAL, *(call("calculator", expression=f"{n}*{n}") for n in range(20))])
    shape = {"hidden_size": 128, "head_dim": 32, "tie_word_embeddings": True, "vocab_size": len(tokenizer)}
    model = tiny_model("llama", spread=1.0, **shape)
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = [0, *range(30, len(tokenizer), 10)]
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    yield from serving(folder)


def test_what_vllm_samples_is_what_is_trained(folder: Path, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(str(folder / "model")), load_tokenizer(str(folder / "model"))
    use_grpo_attention(model)
    settings = {"vllm_mode": "server", "vllm_server_base_url": server.url, "vllm_server_timeout": PATIENCE}
    inner = build_engine(
        "vllm",
        model,
        tokenizer,
        config=RolloutConfig(engine="vllm", **settings),
        accelerator=Accelerator(cpu=True),
        weights=model.named_parameters,
    )
    turns = Turns(tokenizer, end_token_ids(model, tokenizer), TurnWorkers({"calculator": calculator}, workers=0))
    engine = with_turns(inner, turns)
    assert isinstance(engine, TurnRounds)
    engine.update_weights(0)
    sampled: list[list[list[int]]] = []
    generate = inner.generate

    def recorded(prompts: list[Prompt], plan: SamplingPlan) -> list[Group]:
        groups = generate(prompts, plan)
        sampled.append([completion.token_ids for group in groups for completion in group.completions])
        return groups

    monkeypatch.setattr(inner, "generate", recorded)
    prompts = [Prompt(n, "", tuple(tokenizer(f"<user>{n}?<end>\n<assistant>")["input_ids"])) for n in range(6)]
    groups = engine.generate(prompts, SamplingPlan(8, LONGEST, 1.0, 3))
    assert len(sampled) >= 3  # some completions have three turns
    completions = [completion for group in groups for completion in group.completions]
    expected, rows = [list(ids) for ids in sampled[0]], list(range(len(completions)))
    for number, turn in enumerate(sampled[1:]):
        rows = [row for row in rows if len(completions[row].given) > number]
        assert len(rows) == len(turn)
        for row, ids in zip(rows, turn, strict=True):
            left = LONGEST - completions[row].given[number][1]
            expected[row] += ids[:left]
    [batch] = pack(groups, max_tokens=10**6)
    assert batch.tokens_N.tolist() == [i for ids in expected for i in ids]
    with torch.no_grad():
        logprobs = LogprobModel(model, uses_packed_attention=True, temperature=1.0)(batch)[0]
    torch.testing.assert_close(batch.sampling_logprobs_N, logprobs, atol=1e-4, rtol=0)
    for completion in completions:
        messages = [message for message in completion.turns["messages"] if message["role"] == "tool"]
        given = [tokenizer.decode(completion.token_ids[start:end]) for start, end in completion.given]
        texts = "".join(f"\n<tool>{message['content']}<end>\n<assistant>" for message in messages)
        assert "".join(given).replace("<end>\n<tool>", "<end>\n<assistant>\n<tool>") == texts
    assert sum(completion.turns["calls"] for completion in completions) > 10


def check_run(folder: Path, metrics: list[dict[str, Any]]) -> None:
    learned = [row for row in metrics if "policy/loss" in row]
    assert len(learned) == 3 and sum(row["tools/calls"] for row in learned) > 0
    for row in learned:
        assert row["policy/sampling_logprob_difference"] < 1e-5
        assert row["rollout/turns"] > 1 and row["policy/grad_norm"] > 0
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    results = [m for row in rollouts for m in row["turns"]["messages"] if m["role"] == "tool"]
    assert {m["content"] for m in results} & {str(n * n) for n in range(20)}
    assert any("turns" in json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines())


def test_a_run_with_tools_and_a_server(folder: Path, server: Running) -> None:
    check_run(folder / "server", run(folder, "server", **server.settings | TOOLS))


def test_a_run_with_tools_and_vllm_in_the_same_process(folder: Path) -> None:
    done = colocated(folder, "colocated", **TOOLS)
    assert done.returncode == 0, done.stderr[-3000:]
    check_run(folder / "colocated", metrics_of(folder / "colocated"))
