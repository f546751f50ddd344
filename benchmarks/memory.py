"""Compare the memory estimate (grpo/tools/memory.py) with the peak memory of real runs on this machine's CPU.

    python benchmarks/memory.py [--only NAME ...] [--output docs/results/memory.json]

Each case runs launch/train.py under an accelerate config: two steps (DDP: three) of a random model of 28 million
weights. Its peak is the process's largest resident set (memory/peak_gib), minus that of the same run with a one-layer
model. glibc is set to return large blocks to the system at once (MALLOC_MMAP_THRESHOLD_), because the blocks that it
keeps are not needed by the run. `python launch/memory.py` computes what fits on a machine.
"""

import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shared import (
    BY_INDEX,
    ROOT,
    character_tokenizer,
    launch_training,
    random_qwen2,
    script_parser,
    write_additions,
    write_json,
)

from grpo.errors import ConfigError
from grpo.runtime.command import run_main

# A CPU without 16-bit products emulates them, five times slower than float32: these cases sample a quarter as many
# tokens, which their estimate includes. A batch has as many tokens as in the other cases.
SHORT = {"sampling.max_completion_length": "32"}
# DDP rebuilds its buckets at the start of the second step and writes to them only at that step's last backward pass:
# the third step is the first that holds them from start to end, as all later ones do.
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
"""Case -> accelerate config, launcher flags, settings."""
HOW = (
    "largest resident set of the main process, minus that of a one-layer model under the same config; each row has "
    "runs of its own, which --only CASE repeats alone"
)
SHAPE = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2)
TINY = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
VOCABULARY = 4096
STEP = {
    "tokens_per_batch": "1024",
    "prompts_per_step": "4",
    "sampling.num_generations": "4",
    "sampling.max_completion_length": "128",
}
TINY_STEP = {"sampling.num_generations": "2", "prompts_per_step": "2", "save_every": "0"}
RETURN_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}


def main() -> None:
    """Measure the cases and write the table."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--only", nargs="*", help=f"these cases; others keep their rows in --output: {'; '.join(CASES)}"
    )
    parser.add_argument("--output", type=Path, help="write the table as JSON")
    options = parser.parse_args()
    unknown = set(options.only or []) - set(CASES)
    if unknown:
        raise ConfigError(f"--only {', '.join(sorted(unknown))}: it must be one of {'; '.join(CASES)}")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.only or list(CASES))
    if options.only and options.output and options.output.is_file():
        kept = json.loads(options.output.read_text())["rows"]
        rows += [row for row in kept if row["case"] not in options.only]
        rows.sort(key=lambda row: list(CASES).index(row["case"]))
    report: dict[str, Any] = {
        "command": "python benchmarks/memory.py --output docs/results/memory.json",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}); seconds include returning memory to the system",
        "model": f"random Qwen2, {rows[0]['parameters']:,} weights; " + json.dumps(SHAPE),
        "how": HOW,
        "rows": rows,
    }
    if options.output:
        write_json(options.output, report)
    else:
        print(json.dumps(report, indent=1))


def measure(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Run the cases in `folder`. Return one row of the table for each."""
    save_models(folder)
    write_additions(folder, BY_INDEX)
    rows = []
    for name in names:
        profile, launch, changes = CASES[name]
        program, _ = run(folder, "tiny", profile, launch, changes)
        peak, seconds = run(folder, "model", profile, launch, STEP | changes)
        expected, parameters = estimated(folder, profile, launch, STEP | changes)
        row = {
            "case": name,
            "parameters": parameters,
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


def estimated(folder: Path, profile: str, launch: list[str], settings: dict[str, str]) -> tuple[dict[str, float], int]:
    """Return the estimate of a case (part -> GiB) and the model's number of weights."""
    from grpo.config.parser import load_config
    from grpo.models.strategies.registry import machine_of
    from grpo.tools.memory import estimate
    from grpo.tools.model_shape import tokenizer_and_shape

    flags = [f"--{key}={value}" for key, value in settings.items()]
    config = load_config([f"--model.name={folder / 'model'}", f"--data.path={folder / 'data.jsonl'}", *flags])
    asked = dict(zip(launch[::2], launch[1::2], strict=True))
    machine = machine_of(str(ROOT / "accelerate_configs" / f"{profile}.yaml"))
    machine = dataclasses.replace(
        machine,
        processes=int(asked.get("--num_processes", machine.processes)),
        precision=asked.get("--mixed_precision", machine.precision),
        cpu=True,
        reads_once=False,
        offloads=False,
    )
    _, shape = tokenizer_and_shape(config, [])
    return estimate(config, shape, 4, machine), sum(parameter.numel() for parameter in shape.parameters())


def save_models(folder: Path) -> None:
    """Save two random models, model/ and tiny/, with one tokenizer of single characters."""
    for name, shape in (("model", SHAPE), ("tiny", TINY)):
        random_qwen2(VOCABULARY, **shape).save_pretrained(folder / name)
        character_tokenizer("?+=0123456789").save_pretrained(folder / name)


def run(folder: Path, model: str, profile: str, launch: list[str], changes: dict[str, str]) -> tuple[float, float]:
    """Train once. Return the main process's peak in GiB and the seconds of the last step."""
    run_dir = folder / f"run-{time.time_ns()}"
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "accelerate_configs" / f"{profile}.yaml"), *launch]
    settings = TINY_STEP | {"model.name": str(folder / model)} | changes
    done = launch_training(launcher, folder, run_dir, settings, RETURN_BLOCKS)
    if not (run_dir / "final").is_dir():
        raise RuntimeError(f"{' '.join(done.args)} failed:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return max(row["memory/peak_gib"] for row in rows), rows[-1]["time/step"]


if __name__ == "__main__":
    run_main(main)
