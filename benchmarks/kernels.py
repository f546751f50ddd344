"""Measure each CPU kernel: one training step's phases with all kernels, and with each one switched off alone.

    python benchmarks/kernels.py [--suite cpu-135m] [--precision bf16] [--threads 2] [--cpu_time] [--output FILE.json]
    python benchmarks/kernels.py --only all_on --busy 1       beside one busy process, without switching anything off

The model is a Llama of the suite's shape (cpu-135m: SmolLM2-135M) with random weights. Phases, of one group of 8
completions with 86 tokens on average: `rollout` decodes --tokens tokens of 32 rows, `reference` is a pass without
gradients, `update` forward and backward passes. The ways alternate, and the least of --rounds rounds counts. The peak
is the most resident memory of an update above that before it, plus AdamW's moments, which a training step has at that
time. A factor above 1 is the gain of the kernel: without it / with it. --cpu_time counts CPU seconds, for a machine
that others use.
"""

import argparse
import gc
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from against_trl.measuring import busy_processes
from shared import character_tokenizer, script_parser, write_json

from grpo.errors import ConfigError
from grpo.runtime.command import run_main

SHAPES = {
    "cpu-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "cpu-gsm8k": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
}
LENGTHS = (128, 40, 60, 75, 90, 110, 120, 65)
PROMPT = 100
PHASES = ("rollout", "reference", "update", "peak")


def main() -> None:
    """Measure all ways and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--suite", choices=list(SHAPES), default="cpu-135m")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8, help="decoded per row in a rollout")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds of one thread")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="run N processes that keep a core busy each")
    parser.add_argument("--only", nargs="+", help="these ways, by their names in the table")
    parser.add_argument("--output", help="write the JSON here")
    options = parser.parse_args()
    ways = {name: way for name, way in all_ways().items() if not options.only or name in options.only}
    if "all_on" not in ways or set(options.only or ways) - set(ways):
        raise ConfigError(f"--only takes names of ways, all_on among them: {', '.join(all_ways())}")
    with busy_processes(options.busy):
        found = measure(options, ways)
    best = {name: {phase: min(row[phase] for row in rows) for phase in PHASES} for name, rows in found.items()}
    base = best["all_on"]
    factors = {name: {phase: own[phase] / base[phase] for phase in PHASES} for name, own in best.items()}
    del factors["all_on"]
    print(table(options, base, factors))
    if options.output:
        write_json(options.output, report(options, best, factors))


def all_ways() -> dict[str, tuple[str, bool]]:
    """Return each way: name -> value of GRPO_KERNELS, and whether gradients are added in place."""
    from grpo.kernels.registry import KERNELS

    names = [name for name, purpose in KERNELS.items() if not purpose.startswith("cuda")]
    return (
        {"all_on": ("auto", True)}
        | {name: (f"auto,-{name}", True) for name in names}
        # A fused layer calls attention.c itself: its effect is seen in layers that run operation by operation.
        | {"decoder_layer and attention": ("auto,-decoder_layer,-attention", True)}
        | {"gradients in place": ("auto", False), "all": ("torch", False)}
    )


def measure(options: argparse.Namespace, ways: dict[str, tuple[str, bool]]) -> dict[str, list[dict[str, float]]]:
    """Return the phases of each way, round by round."""
    import torch

    from grpo.models.logprob_model import LogprobModel, use_grpo_attention

    torch.set_num_threads(1 if options.cpu_time else options.threads)
    model = random_model(options.suite)
    if not use_grpo_attention(model):
        raise ConfigError("the packed attention differs from the model's own on this machine")
    trained = LogprobModel(model, uses_packed_attention=True, temperature=1.0)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, (kernels, in_place) in ways.items():
            os.environ["GRPO_KERNELS"] = kernels
            trained.accumulate_grads_inplace = in_place
            row = one_round(options, trained)
            if number:  # the first round compiles and warms up
                found[name].append(row)
            print(number, name, json.dumps(row), file=sys.stderr, flush=True)
    return found


def random_model(suite: str) -> Any:
    """Return a random Llama of the suite's shape."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    tokens = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(tie_word_embeddings=True, rope_theta=1e5, **SHAPES[suite], **tokens)
    return AutoModelForCausalLM.from_config(config).float()


def one_round(options: argparse.Namespace, trained: Any) -> dict[str, float]:
    """Return the seconds of each phase, and the GiB of the peak, with the kernels that are switched on now."""
    import torch

    from grpo.packing import pack
    from grpo.rollout.native_engine import NativeEngine
    from grpo.runtime.device import return_freed_memory
    from grpo.types import Completion, Group, Prompt, SamplingPlan

    device = torch.device("cpu")
    clock = time.process_time if options.cpu_time else time.perf_counter
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, SHAPES[options.suite]["vocab_size"], (count,), generator=generator).tolist()

    prompts = [Prompt(index, "", tuple(tokens(PROMPT))) for index in range(4)]
    completions = [Completion(tokens(length), [0.0] * length, True, "") for length in LENGTHS]
    batch = pack([Group(prompts[0], completions)], torch.ones(1, len(LENGTHS)), max_tokens=2048)[0]
    row: dict[str, float] = {}
    model = trained.model
    with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
        engine = NativeEngine(model, character_tokenizer("a"), slots=32, uses_packed_attention=True)
        engine.end_ids = set()  # nothing ends early
        started = clock()
        engine.generate(prompts, SamplingPlan(8, options.tokens, 1.0, 0))
        row["rollout"] = clock() - started
        started = clock()
        with torch.no_grad():
            trained(batch)
        row["reference"] = clock() - started
    del engine
    model.zero_grad(set_to_none=True)
    gc.collect()
    return_freed_memory(device)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    started = clock()
    with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
        logprobs, _ = trained(batch)
    logprobs.sum().backward()
    row["update"] = clock() - started
    moments = 8 * sum(parameter.numel() for parameter in model.parameters()) / 2**30
    row["peak"] = resident("VmHWM") - before + moments
    model.zero_grad(set_to_none=True)
    return row


def resident(key: str) -> float:
    """Return a line of /proc/self/status in GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 2**20
    raise ConfigError("memory is read from /proc: run this on Linux")


def table(options: argparse.Namespace, base: dict[str, float], factors: dict[str, dict[str, float]]) -> str:
    """Return the Markdown table."""
    kind = "CPU time of one thread" if options.cpu_time else f"wall clock, {options.threads} threads"
    lines = [
        f"{options.suite}, precision {options.precision}, {kind}; all on: "
        + ", ".join(f"{phase} {base[phase]:.3g} {'GiB' if phase == 'peak' else 's'}" for phase in PHASES),
        "",
        "| off | " + " | ".join(PHASES) + " |",
        "|---" * (len(PHASES) + 1) + "|",
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{found[phase]:.2f}" for phase in PHASES) + " |" for name, found in factors.items()
    ]
    return "\n".join(lines)


def report(options: argparse.Namespace, best: dict[str, Any], factors: dict[str, Any]) -> dict[str, Any]:
    """Return the results, the command and the machine."""
    from importlib.metadata import version

    names = {
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    }
    return {
        "command": " ".join(["python benchmarks/kernels.py", *sys.argv[1:]]),
        "machine": {"processor": ", ".join(sorted(names)) or platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": version("torch")},
        "variables": {key: os.environ[key] for key in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if key in os.environ},
        "seconds": "of CPU time, one thread" if options.cpu_time else "of wall-clock time",
        "busy_processes": options.busy,
        "least": best,
        "factors": factors,
    }


if __name__ == "__main__":
    run_main(main)
