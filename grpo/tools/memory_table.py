"""Estimate the memory that each process needs to train a config, without loading weights or data.

    grpo memory [--config FILE ...] [--key.subkey VALUE ...] [--machine ACCELERATE.yaml ...] [--available GIB]
    grpo memory --published [--output FILE.json]     published model shapes on common machines

Takes the flags of `grpo train`. The longest prompt is taken to be data.max_prompt_length. The program itself, and on a
GPU the CUDA context and the allocator's gaps, are not included. docs/scaling.md has the model behind the numbers.
"""

import json
from pathlib import Path
from typing import Any

from grpo.config.parser import load_config
from grpo.config.schema import Config
from grpo.errors import ConfigError
from grpo.tools.arguments import command_parser

UNLIMITED_PROMPT = 512
"""Tokens of the longest prompt where data.max_prompt_length is null."""


def main(argv: list[str]) -> None:
    """Run the command `grpo memory`."""
    parser = command_parser("memory", __doc__)
    parser.add_argument("--machine", nargs="+", default=[], help="accelerate config files; default: one CPU process")
    parser.add_argument("--available", type=float, help="GiB of one GPU (or of a process): state what fits")
    parser.add_argument("--published", action="store_true", help="a table of published model shapes instead")
    parser.add_argument("--output", type=Path, help="write the estimates to this JSON file")
    options, flags = parser.parse_known_args(argv)
    if options.available is not None and options.available <= 0:
        raise ConfigError(f"--available is {options.available}, it must be above 0 GiB")
    if options.published:
        if flags:
            raise ConfigError(f"--published has settings of its own: leave {' '.join(flags)} out")
        from grpo.tools.memory_published import estimate_published

        text = json.dumps(estimate_published(), indent=1)
        print(text)
    else:
        estimates = estimate_machines(load_config(flags), options.machine)
        text = json.dumps(estimates, indent=1)
        print(format_table(estimates, options.available))
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def estimate_machines(config: Config, machines: list[str]) -> dict[str, dict[str, float]]:
    """Estimate a config on several machines.

    Args:
        config: The config.
        machines: Paths of accelerate config files; none means one CPU process.

    Returns:
        {machine: {part: GiB per process}}; the part "peak" is the maximum at one time.
    """
    from grpo.data.rows import load_examples
    from grpo.models.strategies.base import Machine
    from grpo.models.strategies.registry import machine_of
    from grpo.tools.memory import estimate
    from grpo.tools.model_shape import tokenizer_and_shape

    kinds = {Path(path).stem: machine_of(path) for path in machines} or {"one CPU process": Machine()}
    needs_rows = config.model.name == "starter" and config.data.name != "arithmetic"
    rows = load_examples(config.data, "train", config.seed) if needs_rows else []
    _, model = tokenizer_and_shape(config, rows)
    longest = config.data.max_prompt_length or UNLIMITED_PROMPT
    return {name: estimate(config, model, longest, machine) for name, machine in kinds.items()}


def format_table(estimates: dict[str, dict[str, float]], available: float | None) -> str:
    """Return the estimates as a table with one column per machine, and a last row about `available` GiB if given."""
    parts = list(dict.fromkeys(part for values in estimates.values() for part in values if part != "peak"))
    rows: list[list[Any]] = [["GiB per process", *estimates]]
    for part in [*parts, "peak"]:
        rows.append([part, *(f"{values[part]:.3f}" if part in values else "-" for values in estimates.values())])
    if available is not None:
        fits = ("yes" if values["peak"] <= available else "no" for values in estimates.values())
        rows.append([f"fits {available:g} GiB", *fits])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
