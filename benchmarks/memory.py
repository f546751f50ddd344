"""Memory: what grpo/tools/memory.py expects beside what runs on this machine's CPU really held; LoRA beside full fine-tuning.

python benchmarks/memory.py [--only NAME ...] [--output docs/results/memory.json]

Each case is a run of launch/train.py under an accelerate config: two steps (DDP: three) of a random model of 28 million weights.
Its peak is the process's largest resident set (memory/peak_gib), less that of the same run with a model of next to nothing.
glibc is told to give large blocks back at once (MALLOC_MMAP_THRESHOLD_), since what it keeps is no need of the run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from grpo.runtime.command import run_main

ROOT = Path(__file__).parent.parent
# A CPU without 16-bit products emulates them, five times slower than float32: these cases sample a quarter as long, which their
# estimate knows. As many tokens are learned from at once as in the others: four groups in one batch instead of one group.
SHORT = {"sampling.max_completion_length": "32"}
# DDP makes its buckets anew at the start of the second step, and until that step's last backward nothing is written to them: the
# third step is the first to hold them from its start to its end, as every later one does.
SETTLED = {"steps": "3"}
CASES: dict[str, tuple[str, list[str], dict[str, str]]] = {
    "full, float32": ("cpu", [], {}),
    "full, float32, no reference": ("cpu", [], {"objective.beta": "0"}),
    "full, float32, gradient checkpointing": ("cpu", [], {"model.gradient_checkpointing": "true"}),
    "full, bf16": ("cpu", ["--mixed_precision", "bf16"], SHORT),
    "LoRA r 16, float32": ("cpu", [], {"lora.r": "16"}),
    "LoRA r 16, bf16": (
        "cpu",
        ["--mixed_precision", "bf16"],
        SHORT | {"lora.r": "16", "model.torch_dtype": "bfloat16"},
    ),
    "full, float32, DDP over 2": ("cpu_2proc", [], SETTLED),
    "full, float32, FSDP2 over 2": ("fsdp2", ["--num_processes", "2", "--mixed_precision", "no"], {}),
}
HOW = (
    "largest resident set of the main process, less that of a one-layer model under the same config; every row is of runs of its "
    "own, which --only CASE repeats alone"
)
SHAPE = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2)
TINY = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
STEP = {
    "tokens_per_batch": "1024",
    "prompts_per_step": "4",
    "sampling.num_generations": "4",
    "sampling.max_completion_length": "128",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", help=f"these cases, others stay as they are in --output: {'; '.join(CASES)}"
    )
    parser.add_argument("--output", type=Path, help="write the table as JSON")
    arguments = parser.parse_args()
    from grpo.errors import ConfigError

    unknown = set(arguments.only or []) - set(CASES)
    if unknown:
        raise ConfigError(f"--only {', '.join(sorted(unknown))}: knows {'; '.join(CASES)}")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.only or list(CASES))
    if arguments.only and arguments.output and arguments.output.is_file():
        kept = json.loads(arguments.output.read_text())["rows"]
        rows += [row for row in kept if row["case"] not in arguments.only]
        rows.sort(key=lambda row: list(CASES).index(row["case"]))
    report: dict[str, Any] = {
        "command": "python benchmarks/memory.py --output docs/results/memory.json",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}); seconds are with a frugal allocator",
        "model": f"random Qwen2, {rows[0]['parameters']:,} weights; " + json.dumps(SHAPE),
        "how": HOW,
        "rows": rows,
    }
    show(arguments.output, report)


def show(output: Path | None, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=1)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


def measure(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    from grpo.config.parser import load_config
    from grpo.models.strategies.registry import machine_of
    from grpo.tools.memory import estimate
    from grpo.tools.model_shape import tokenizer_and_shape

    make(folder)
    (folder / "noise.py").write_text(
        "def noise(completions, **rest):\n    return [float(i % 3) for i in range(len(completions))]\n"
    )
    lines = [json.dumps({"question": f"{a}+1=", "answer": f"#### {a + 1}"}) for a in range(16)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    rows = []
    for name in names:
        profile, launch, changes = CASES[name]
        settings = STEP | changes
        program, _ = run(folder, "tiny", profile, launch, changes)
        peak, seconds = run(folder, "model", profile, launch, settings)
        flags = [f"--{key}={value}" for key, value in settings.items()]
        config = load_config([f"--model.name={folder / 'model'}", f"--data.path={folder / 'data.jsonl'}", *flags])
        machine = machine_of(str(ROOT / "accelerate_configs" / f"{profile}.yaml"))
        asked = dict(zip(launch[::2], launch[1::2], strict=True))
        machine = type(machine)(
            machine.kind,
            int(asked.get("--num_processes", machine.processes)),
            asked.get("--mixed_precision", machine.precision),
            True,
        )
        _, shape = tokenizer_and_shape(config, [])
        expected = estimate(config, shape, 4, machine)
        row = {
            "case": name,
            "parameters": sum(parameter.numel() for parameter in shape.parameters()),
            "estimate_mib": round(expected["peak"] * 1024),
            "measured_mib": round((peak - program) * 1024),
            "estimate_over_measured": round(expected["peak"] / (peak - program), 3),
            "program_mib": round(program * 1024),
            "seconds_per_step": round(seconds, 2),
            "parts_mib": {part: round(value * 1024) for part, value in expected.items()},
        }
        print(json.dumps({key: value for key, value in row.items() if key != "parts_mib"}), flush=True)
        rows.append(row)
    return rows


def make(folder: Path) -> None:
    """Two random models with one tokenizer of single characters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    letters = ["<end>", "<pad>", "?", "+", "=", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
    inner = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", unk_token="?")
    for name, shape in (("model", SHAPE), ("tiny", TINY)):
        torch.manual_seed(0)
        config = Qwen2Config(vocab_size=4096, eos_token_id=0, pad_token_id=1, bos_token_id=None, **shape)  # type: ignore[arg-type]
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def run(folder: Path, model: str, profile: str, launch: list[str], changes: dict[str, str]) -> tuple[float, float]:
    """-> (peak of the main process in GiB, seconds of the second step)."""
    run_dir = folder / f"run-{time.time_ns()}"
    settings = {
        "model.name": str(folder / model),
        "data.path": str(folder / "data.jsonl"),
        "data.system_prompt": "null",
        "run_dir": str(run_dir),
        "steps": "2",
        "eval_every": "0",
        "save_every": "0",
        "scoring.workers": "0",
        "tracking.report_to": "[]",
        "tracking.report": "false",
        "sampling.max_completion_length": "8",
        "sampling.num_generations": "2",
        "prompts_per_step": "2",
        "rewards": json.dumps({f"{folder}/noise.py:noise": 1.0}),
    } | changes
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{profile}.yaml"), *launch]
    command += [str(ROOT / "launch" / "train.py"), *(f"--{key}={value}" for key, value in settings.items())]
    frugal = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | frugal)
    if not (run_dir / "final").is_dir():
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return max(row["memory/peak_gib"] for row in rows), rows[-1]["time/step"]


if __name__ == "__main__":
    run_main(main)
