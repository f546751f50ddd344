"""Exports in llama.cpp: its converter reads every kind of export, and what it makes answers as the export does.

    GRPO_LLAMA_CPP=FOLDER pytest -m slow tests/tools/test_llama_cpp.py

FOLDER holds convert_hf_to_gguf.py (a checkout of llama.cpp, or vendor/llama.cpp of the source package of
llama-cpp-python). GRPO_SMOLLM2 names the GGUF of `python launch/fetch.py smollm2`. With xllamacpp installed, llama.cpp
itself answers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.config.parser import load_config
from grpo.data.arithmetic import generate_problems
from grpo.data.gguf import plain_model
from grpo.tools.export import export
from grpo.trainer import train

LLAMA_CPP = Path(os.environ.get("GRPO_LLAMA_CPP", "no llama.cpp"))
SMOLLM2 = os.environ.get("GRPO_SMOLLM2", "models/SmolLM2-135M-Instruct.Q4_1.gguf")
QUESTIONS = [row["question"] for row in generate_problems(8, seed=0, split="held_out")]
CONVERT = """
import sys
folder, known, *arguments = sys.argv[1:]
sys.path.insert(0, folder)
import convert_hf_to_gguf
from conversion.base import TextModel
if known:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: known
sys.argv = ["convert_hf_to_gguf.py", *arguments]
convert_hf_to_gguf.main()
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (LLAMA_CPP / "convert_hf_to_gguf.py").is_file(), reason="set GRPO_LLAMA_CPP to a folder of llama.cpp"
    ),
]


def trained(tmp_path: Path, model: str) -> Path:
    """Train one step on generated problems."""
    settings = {
        "model.name": model,
        "data.name": "arithmetic",
        "steps": 1,
        "eval_every": 0,
        "run_dir": tmp_path / "run",
    }
    settings |= {"prompts_per_step": 2, "sampling.num_generations": 4, "sampling.max_completion_length": 8}
    settings |= {"scoring.workers": 0, "tracking.report_to": "[]", "tracking.report": "false"}
    return train(load_config([f"--{key}={value}" for key, value in settings.items()]))


def convert(folder: Path, known: str = "") -> subprocess.CompletedProcess[str]:
    """Run llama.cpp's converter in float32.

    Args:
        folder: An export.
        known: Pre-tokenizer of llama.cpp that is taken for that of the export. "" = the converter looks it up.
    """
    arguments = [str(folder), "--outtype", "f32", "--outfile", str(folder.parent / "model.gguf")]
    command = [sys.executable, "-c", CONVERT, str(LLAMA_CPP), known, *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent)


def answers(folder: str, questions: list[str], length: int) -> list[str]:
    """Return the greedy answers of transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for question in questions:
        ids = torch.tensor([tokenizer.encode(prompt(tokenizer, question), add_special_tokens=False)])
        made = model.generate(ids, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        found.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def prompt(tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def answers_of_llama_cpp(gguf: Path, folder: Path, questions: list[str], length: int) -> list[str]:
    """Return the greedy answers of llama.cpp."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp: llama.cpp itself")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(gguf), 1024, 1, False
    server, tokenizer = xllamacpp.Server(params), AutoTokenizer.from_pretrained(folder)
    found = []
    for question in questions:
        asked = {"prompt": prompt(tokenizer, question), "max_tokens": length, "temperature": 0.0, "top_k": 1}
        found.append(server.handle_completions(asked)["choices"][0]["text"])
    return found


@pytest.mark.parametrize("kind", ["gguf-ready", "merged"])
def test_the_tiny_model(tmp_path: Path, kind: str) -> None:
    """The converter knows tokenizers by a checksum of their vocabulary, so it refuses every newly trained one, and says
    so. Told that it splits text like SmolLM's (which it does for numbers of one digit), it converts.
    """
    folder = export(trained(tmp_path, "starter"), kind)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    refused = convert(folder)
    assert refused.returncode != 0 and "BPE pre-tokenizer was not recognized" in refused.stderr
    done = convert(folder, known="smollm")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = answers(str(folder), QUESTIONS, 48)
    gguf = folder.parent / "model.gguf"
    assert answers(plain_model(str(gguf)), QUESTIONS, 48) == expected
    assert answers_of_llama_cpp(gguf, folder, QUESTIONS, 48) == expected


@pytest.mark.skipif(not Path(SMOLLM2).is_file(), reason="python launch/fetch.py smollm2, or set GRPO_SMOLLM2")
@pytest.mark.parametrize("kind", ["gguf-ready", "merged"])
def test_smollm2(tmp_path: Path, kind: str) -> None:
    """The converter needs no help. llama.cpp's float32 differs from torch's in the last bits: short answers."""
    folder = export(trained(tmp_path, SMOLLM2), kind)
    done = convert(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    gguf = folder.parent / "model.gguf"
    expected = answers(str(folder), QUESTIONS[:3], 16)
    assert answers(plain_model(str(gguf)), QUESTIONS[:3], 16) == expected
    assert answers_of_llama_cpp(gguf, folder, QUESTIONS[:3], 16) == expected
