"""A hybrid model through whole runs: native engine, resume, adapter, evaluation, saved model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo.tools.evaluate import main as evaluate
from tests.hybrids import hybrid
from tests.test_trainer import CHANGING, arguments, run


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for `arguments`: the tokenizer and data of the tests, and a tiny Qwen3.5."""
    arguments(tmp_path, "none")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "by_index.py").write_text(
        "def by_index(completions, **columns):\n    return [float(i % 3) for i in range(len(completions))]\n"
    )
    hybrid("qwen3_5_text", spread=2.0, vocab_size=42).save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["null", "4"])
def test_resume_is_exact_and_the_engine_has_the_trained_weights(place: Path, rank: str) -> None:
    extra = {"lora.r": rank, "steps": 2, "tokens_per_batch": 32, "data.max_prompt_length": 16}
    extra["rewards"] = json.dumps({f"{place}/by_index.py:by_index": 1.0})
    whole = run(place, "whole", **extra)
    assert len((place / "whole" / "evaluations.jsonl").read_text().splitlines()) == 2 * 12
    # Rounding only, also after updates and with the adapter merged: sampled from what is trained.
    key = "policy/sampling_logprob_difference"
    differences = [row[key] for row in whole if key in row]  # evaluations have rows of their own
    assert len(differences) == 2 and max(differences) < 1e-5
    shutil.copytree(place / "whole", place / "part")
    shutil.rmtree(place / "part" / "checkpoints" / "step-2")
    shutil.rmtree(place / "part" / "final")
    resumed = run(place, "part", resume="auto", **extra)
    fixed = [
        [{k: v for k, v in row.items() if not k.startswith(CHANGING)} for row in rows] for rows in (whole, resumed)
    ]
    assert fixed[0] == fixed[1]
    stored = [load_file(place / name / "checkpoints" / "step-2" / "model.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])
    final = AutoModelForCausalLM.from_pretrained(place / "whole" / "final")
    start = AutoModelForCausalLM.from_pretrained(place / "model")
    moved = "model.layers.0.linear_attn.in_proj_qkv.weight"
    assert not torch.equal(final.get_parameter(moved), start.get_parameter(moved))


def test_evaluation_equals_that_of_the_reference_engine(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for engine in ("native", "transformers"):
        flags = {"data.path": place / "data.jsonl", "rollout.engine": engine, "sampling.max_completion_length": 6}
        settings = [f"--{key}={value}" for key, value in flags.items()]
        evaluate(["--model", str(place / "model"), "--items", str(place / f"{engine}.jsonl"), *settings])
        found[engine] = [json.loads(line) for line in (place / f"{engine}.jsonl").read_text().splitlines()]
    assert len(found["native"]) == 12
    assert found["native"] == found["transformers"]
