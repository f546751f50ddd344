"""Look before training: the flags of train.py -> data, prompts, rewards, batch arithmetic, memory and time, without a weight.

python launch/check.py [--config FILE ...] [--key.subkey VALUE ...] [--machine ACCELERATE.yaml] [--output CHECK.json]
python launch/check.py [...] --completions FILE.jsonl --output SCORES.jsonl     each completion's rewards
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from grpo.config.parser import load_config
from grpo.config.schema import Config, flatten, to_dict
from grpo.errors import ConfigError
from grpo.runtime.command import run_main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--completions", help='JSONL of {"prompt", "completion", + columns}, or a rollouts.jsonl')
    parser.add_argument("--machine", help="an accelerate config file: estimate each process's memory there")
    parser.add_argument("--output", help="what was found as JSON; with --completions, the scores as JSONL")
    ours, rest = parser.parse_known_args(sys.argv[1:])
    config = load_config(rest)
    if ours.completions:
        score_file(config, ours.completions, ours.output)
        return

    from grpo.models.strategies.registry import machine_of
    from grpo.tools.check import check
    from grpo.tools.check_display import show

    found = check(config, machine_of(ours.machine) if ours.machine else None)
    show(found, changed_settings(config))
    if ours.output:
        Path(ours.output).write_text(json.dumps(dataclasses.asdict(found), indent=1, ensure_ascii=False))
    if found.problems:
        raise ConfigError("; ".join(found.problems))


def score_file(config: Config, path: str, output: str | None) -> None:
    from grpo.data.files import read_table
    from grpo.tools.check import score_rows

    scored = score_rows(config, read_table(path, "--completions").rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored)
    if output:
        Path(output).write_text(lines, encoding="utf-8")
        print(f"{len(scored)} completions scored: {output}")
    else:
        print(lines, end="")


def changed_settings(config: Config) -> dict[str, object]:
    """Every key whose value is not the default."""
    default = flatten(to_dict(Config()))
    return {key: value for key, value in flatten(to_dict(config)).items() if value != default[key]}


if __name__ == "__main__":
    run_main(main)
