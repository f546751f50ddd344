"""Write docs/comparison.md from docs/results/*.json. Each file names the command that measured it.

python benchmarks/comparison.py            write the page
python benchmarks/comparison.py --count    count this project's lines, keys and tests first
"""

import ast
from typing import Any

from shared import DOCS, RESULTS, ROOT, read_json, script_parser, write_json

from grpo.runtime.command import run_main

PAGE = DOCS / "comparison.md"
PHASES = {
    "step": "whole step",
    "rollout": "sampling",
    "update": "update",
    "peak_memory": "peak memory over the loaded model",
    "tokens_per_second": "tokens per second",
}


def main() -> None:
    """Write the page."""
    parser = script_parser(__doc__)
    parser.add_argument("--count", action="store_true", help="count lines, keys and tests first")
    if parser.parse_args().count:
        write_json(RESULTS / "size.json", counted())
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


def counted() -> dict[str, Any]:
    """Return this project's size."""
    from grpo.config.schema import Config, flatten, to_dict

    sources = sorted((ROOT / "grpo").rglob("*.py"))
    tests = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("test_*.py")]
    return {
        "command": "python benchmarks/comparison.py --count",
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources),
        "files": len(sources),
        "loop_lines": len((ROOT / "grpo" / "trainer.py").read_text(encoding="utf-8").splitlines()),
        "keys": len(flatten(to_dict(Config()))),
        "tests": sum(
            isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for tree in tests for node in tree.body
        ),
    }


def read(name: str) -> dict[str, Any]:
    """Return a stored result."""
    return read_json(RESULTS / f"{name}.json")


def page() -> str:
    """Return the text of the page."""
    peers, size = read("peers"), read("size")
    lines = [
        "# Comparison",
        "",
        "Written by `python benchmarks/comparison.py` from `docs/results/*.json`; a test holds the two together.",
        "",
        *beside_trl(),
        *equal_to_trl(),
        "## Features",
        "",
        f"{peers['read']} This project was counted by `{size['command']}`: {size['lines']:,} lines in {size['files']} "
        f"files, the loop's file {size['loop_lines']}.",
        "",
        "| | " + " | ".join(system if system != "this" else "**this**" for system in peers["systems"]) + " |",
        "|---" * (len(peers["systems"]) + 1) + "|",
    ]
    own = {"lines": f"{size['lines']:,}", "keys": str(size["keys"]), "tests": str(size["tests"])}
    for row in peers["rows"]:
        cells = [row["cells"].get(system, "not looked at") for system in peers["systems"]]
        cells[0] = cells[0].format(**own)
        lines.append(f"| **{row['what']}** | " + " | ".join(cells) + " |")
    lines += ["", "Where each row was read:", ""]
    lines += [f"- {row['what']}: {'; '.join(row['sources'])}" for row in peers["rows"]]
    lines += [
        "",
        "Speed of the others beside this project: not measured; they need a GPU. On a GPU this project was not "
        "measured either.",
    ]
    return "\n".join(lines) + "\n"


def beside_trl() -> list[str]:
    """Return the section about speed."""
    result = read("cpu-gsm8k")
    machine, versions = result["machine"], result["versions"]
    command = result.get("command", f"python launch/benchmark.py --suite {result['suite']} --data.path train.jsonl")
    ratios = result["ratios"]
    lines = [
        "## Speed beside TRL",
        "",
        f"`{command}` on {machine['cores']} CPU cores, torch {versions['torch']}, TRL {versions['trl']}: the same "
        f"model, prompts, rewards, group size and optimizer, in alternating processes. TRL divided by ours (tokens per "
        f"second: ours divided by TRL); above 1, ours is better.",
        "",
        "| | " + " | ".join(f"TRL, {name}" for name in ratios) + " |",
        "|---" * (len(ratios) + 1) + "|",
    ]
    for key, what in PHASES.items():
        if all(key in values for values in ratios.values()):
            lines.append(f"| {what} | " + " | ".join(f"{values[key]:.2f}" for values in ratios.values()) + " |")
    return [*lines, ""]


def equal_to_trl() -> list[str]:
    """Return the parity table: for each variant the largest differences over its settings."""
    result = read("parity")
    worst: dict[str, list[float]] = {}
    for row in result["cases"]:
        known = worst.setdefault(row["loss_type"], [0.0, 0.0, 0.0, 0.0])
        worst[row["loss_type"]] = [
            known[0] + 1,
            max(known[1], row["loss"]),
            max(known[2], row["gradient_norm"]),
            max(known[3], row["gradient"]),
        ]
    lines = [
        "## The same numbers as TRL",
        "",
        f"`{result['command']}`: the same completions and rewards through TRL's own `train()`, two optimizer steps "
        f"each, float32; the largest relative difference over all settings (KL, scaling, masks, clips, levels). Where "
        f"the two differ on purpose, [theory.md](theory.md) names the test that shows who is right.",
        "",
        "| loss_type | settings | loss | gradient norm | all gradients |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {int(count)} | {loss:.1e} | {norm:.1e} | {gradient:.1e} |"
        for name, (count, loss, norm, gradient) in sorted(worst.items())
    ]
    whole = result["five_steps"]
    moved = (
        f"After five AdamW steps the weights are apart by {whole['moved']:.1e} of what they moved, none by more than "
        f"{whole['weights']:.1e}."
    )
    return [*lines, "", moved, ""]


if __name__ == "__main__":
    run_main(main)
