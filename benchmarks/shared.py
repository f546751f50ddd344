"""Helpers of the measuring scripts: folders, arguments, results, tiny models, and runs of launch/train.py."""

import argparse
import json
import os
import subprocess
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
BY_INDEX = "def noise(completions, **columns):\n    return [float(i % 3) for i in range(len(completions))]\n"
"""A reward without a signal: no group is flat."""
BY_LENGTH = "def noise(completions, **columns):\n    return [float(len(c[0]['content']) % 3) for c in completions]\n"
"""A reward that does not depend on which process scores a completion."""
TINY_RUN = {
    "data.system_prompt": "null",
    "steps": "2",
    "eval_every": "0",
    "scoring.workers": "0",
    "tracking.report_to": "[]",
    "tracking.report": "false",
    "sampling.max_completion_length": "8",
}
"""Settings of a short run that writes no report."""


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """Return an argument parser that prints the script's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: str | Path, report: Any) -> None:
    """Write a report, and the folder it lies in."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def markdown(lines: list[str]) -> str:
    """Join the lines of a page. Paragraphs and list items are wrapped at 118 columns, tables and headings are not."""
    wrapped: list[str] = []
    for line in lines:
        indent = "  " if line.startswith("- ") else ""
        wrap = textwrap.TextWrapper(118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        wrapped += [line] if line.startswith(("|", "#")) or not line else wrap.wrap(line)
    return "\n".join(wrapped) + "\n"


def character_tokenizer(characters: str) -> Any:
    """Return a tokenizer with one token per character. Id 0 ends, 1 pads and stands for unknown characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<end>", "<pad>", *characters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")


def random_qwen2(vocabulary: int, **shape: int) -> Any:
    """Return a random float32 Qwen2, always the same one."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    tokens = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    config = Qwen2Config(vocab_size=vocabulary, **tokens, **shape)  # type: ignore[arg-type]
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def write_additions(folder: Path, reward: str) -> None:
    """Write data.jsonl (16 additions) and noise.py (the code of the reward `noise`) into a folder."""
    lines = [json.dumps({"question": f"{a}+1=", "answer": f"#### {a + 1}"}) for a in range(16)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "noise.py").write_text(reward)


def launch_training(
    launcher: list[str], folder: Path, run_dir: Path, changes: dict[str, str], variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run launch/train.py on the files of `write_additions`.

    Args:
        launcher: The command before the script: a Python, or accelerate's launcher.
        folder: The folder of `write_additions`.
        run_dir: The run directory.
        changes: Settings beside TINY_RUN.
        variables: Environment variables to set.
    """
    settings = TINY_RUN | {
        "data.path": str(folder / "data.jsonl"),
        "run_dir": str(run_dir),
        "rewards": json.dumps({f"{folder}/noise.py:noise": 1.0}),
    }
    flags = [f"--{key}={value}" for key, value in (settings | changes).items()]
    command = [*launcher, str(ROOT / "launch" / "train.py"), *flags]
    environment = os.environ | (variables or {})
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
