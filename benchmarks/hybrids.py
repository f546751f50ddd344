"""Measure sampling and updates of a hybrid model beside the path that its model code allows without grpo's layers.

    python benchmarks/hybrids.py [--output docs/results/hybrids.json] [--rounds 3] [--shapes tiny 135m-wide]

Qwen3.5 models with random weights: `tiny` has the width of the tiny model, `135m-wide` that of SmolLM2-135M, with 4 of
its 30 layers and as much of its vocabulary, so that layers and head have their share of the work. Both paths sample
the same completions of the same prompts with the same weights, and train on the same groups:

    rows      rollout.engine transformers, and padded rows, each with its prompt
    grpo      rollout.engine native, and packed rows that share prompts

An update is the forward and the backward pass of all batches, of a policy gradient with random advantages. The two
alternate. Seconds are medians over rounds, after one round of warm-up. With --cpu-time they are those of the process on
the processor, not of the clock: for one thread on a machine that runs other programs, too.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from shared import script_parser, write_json
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grpo.runtime.command import run_main

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "layers": 4, "heads": 4, "key_heads": 2, "head_dim": 64, "vocab_size": 1024},
    "135m-wide": {"hidden_size": 576, "layers": 4, "heads": 9, "key_heads": 3, "head_dim": 128, "vocab_size": 6144},
}
PROMPTS, SAMPLES, NEW_TOKENS, BUDGET = 8, 8, 48, 4096
"""Prompts, completions of each, tokens of a completion at most, tokens of a batch at most."""


def main() -> None:
    """Measure each shape and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--output", help="write the JSON here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="measure time on the processor")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    found = {name: measure(name, options.rounds, clock) for name in options.shapes}
    print("| model | phase | rows | grpo | ratio |\n|---|---|---|---|---|")
    for name, phases in found.items():
        for phase, seconds in phases["median_seconds"].items():
            ratio = seconds["rows"] / seconds["grpo"]
            print(f"| {name} | {phase} | {seconds['rows']:.2f} s | {seconds['grpo']:.2f} s | {ratio:.1f} |")
    if options.output:
        report = {
            "command": f"python benchmarks/hybrids.py --rounds {options.rounds}{' --cpu-time' * options.cpu_time} "
            "--output docs/results/hybrids.json",
            "clock": "processor" if options.cpu_time else "wall",
            "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "versions": {package: version(package) for package in ("torch", "transformers")},
            "work": {
                "prompts": PROMPTS,
                "prompt_tokens": "32 to 64",
                "completions": SAMPLES,
                "new_tokens": NEW_TOKENS,
                "tokens_per_batch": BUDGET,
            },
            "shapes": found,
        }
        write_json(options.output, report)


def measure(name: str, rounds: int, clock: Callable[[], float]) -> dict[str, object]:
    """Return median seconds by phase and path, and the largest difference of the two paths' logprobs."""
    from grpo.models.logprob_model import LogprobModel, use_grpo_attention
    from grpo.packing import pack
    from grpo.rollout.engine import build_engine
    from grpo.types import Completion, Group, Prompt, SamplingPlan

    models = {"rows": build(name), "grpo": build(name)}
    assert use_grpo_attention(models["grpo"])
    torch.manual_seed(1)
    sizes = torch.randint(32, 65, (PROMPTS,)).tolist()
    prompts = [Prompt(i, "", tuple(torch.randint(2, 1000, (size,)).tolist())) for i, size in enumerate(sizes)]
    plan = SamplingPlan(SAMPLES, NEW_TOKENS, 1.0, seed=0)
    engines = {
        path: build_engine(engine, models[path], _Tokenizer(), slots=64, uses_packed_attention=path == "grpo")
        for path, engine in (("rows", "transformers"), ("grpo", "native"))
    }
    groups = {path: engine.generate(prompts, plan) for path, engine in engines.items()}
    completions = {path: [c for group in groups[path] for c in group.completions] for path in groups}
    same = [a.token_ids == b.token_ids for a, b in zip(completions["rows"], completions["grpo"], strict=True)]
    # Updates: a random model ends no completion, so each is cut to a random length.
    lengths = torch.randint(NEW_TOKENS // 8, NEW_TOKENS, (PROMPTS, SAMPLES)).tolist()
    cut = [
        Group(
            group.prompt,
            [
                Completion(c.token_ids[:length], c.logprobs[:length], True, "")
                for c, length in zip(group.completions, row, strict=True)
            ],
        )
        for group, row in zip(groups["grpo"], lengths, strict=True)
    ]
    batches = pack(cut, torch.randn(PROMPTS, SAMPLES), max_tokens=BUDGET)
    scorers = {
        path: LogprobModel(models[path], uses_packed_attention=path == "grpo", temperature=1.0) for path in models
    }

    def update(path: str) -> torch.Tensor:
        logprobs = []
        for batch in batches:
            logprobs_N = scorers[path](batch)[0]
            (batch.advantages_N * logprobs_N).sum().backward()
            logprobs.append(logprobs_N.detach())
        models[path].zero_grad()
        return torch.cat(logprobs)

    difference = float((update("rows") - update("grpo")).abs().max())
    phases: dict[str, Callable[[str], object]] = {
        "rollout": lambda path: engines[path].generate(prompts, plan),
        "update": update,
    }
    seconds: dict[str, dict[str, list[float]]] = {phase: {path: [] for path in models} for phase in phases}
    for _ in range(rounds):
        for phase, run in phases.items():
            for path in models:
                start = clock()
                run(path)
                seconds[phase][path].append(clock() - start)
    return {
        "parameters": sum(parameter.numel() for parameter in models["grpo"].parameters()),
        "same_completions": sum(same) / len(same),
        "largest_logprob_difference": difference,
        "median_seconds": {
            phase: {path: statistics.median(found) for path, found in paths.items()} for phase, paths in seconds.items()
        },
    }


def build(name: str) -> PreTrainedModel:
    """Return a Qwen3.5 model with random weights: three layers of gated DeltaNet before each layer of attention."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["hidden_size"] * 8 // 3,
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["key_heads"],
        head_dim=shape["head_dim"],
        linear_num_key_heads=shape["heads"],
        linear_num_value_heads=shape["heads"],
        linear_key_head_dim=shape["head_dim"],
        linear_value_head_dim=shape["head_dim"],
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()


class _Tokenizer:
    eos_token_id = pad_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Return token ids as text."""
        return json.dumps(ids)


if __name__ == "__main__":
    run_main(main)
