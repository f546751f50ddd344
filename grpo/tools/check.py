"""Check a config without loading weights: data, prompts, rewards, batch arithmetic, memory and time.

    grpo check [--config FILE ...] [--key.subkey VALUE ...] [--machine ACCELERATE.yaml] [--output CHECK.json] [--all]
    grpo check [...] --red_team                                         search for wrong answers that the rewards pay
    grpo check [...] --probe MINUTES                                    load the weights, measure a few steps, forecast
    grpo check [...] --completions FILE.jsonl --output SCORES.jsonl     the rewards of each completion

Takes the flags of `grpo train`, whose --help lists the config keys.
"""

import dataclasses
import json
from pathlib import Path

from grpo.config.parser import load_config
from grpo.config.schema import Config, flatten, to_dict
from grpo.errors import ConfigError
from grpo.tools.arguments import command_parser


def main(argv: list[str]) -> None:
    """Run the command `grpo check`. Problems are a ConfigError."""
    parser = command_parser("check", __doc__)
    parser.add_argument("--completions", help='JSONL of {"prompt", "completion", + columns}, or a rollouts.jsonl')
    parser.add_argument("--machine", help="an accelerate config file: estimate the memory of each process on it")
    parser.add_argument(
        "--red_team",
        "--red-team",
        action="store_true",
        help="search for completions that earn rewards without being right",
    )
    parser.add_argument(
        "--probe", type=float, metavar="MINUTES", help="sample and train for MINUTES, discard it, and forecast the run"
    )
    parser.add_argument(
        "--flat_share", "--flat-share", type=float, default=0.2, help="share of flat groups to stay below with --probe"
    )
    parser.add_argument("--output", help="write the findings as JSON; with --completions, the scores as JSONL")
    parser.add_argument("--all", action="store_true", help="show every key, not only those that are not the defaults")
    options, flags = parser.parse_known_args(argv)
    config = load_config(flags)
    if options.completions:
        from grpo.tools.score_completions import score_file

        score_file(config, options.completions, options.output)
        return

    from grpo.models.strategies.registry import machine_of
    from grpo.tools.check_config import check
    from grpo.tools.check_display import show

    machine = machine_of(options.machine) if options.machine else None
    changed = changed_settings(config)
    found = check(config, machine, red_team=options.red_team)
    if options.probe is not None and not found.problems:
        from grpo.tools.forecast import forecast

        found.forecast = forecast(config, options.probe, options.flat_share)
    show(found, changed, everything=options.all)
    if options.output:
        Path(options.output).write_text(json.dumps(dataclasses.asdict(found), indent=1, ensure_ascii=False))
    if found.problems:
        raise ConfigError("; ".join(found.problems))


def changed_settings(config: Config) -> dict[str, object]:
    """Return every key whose value is not the default."""
    default = flatten(to_dict(Config()))
    return {key: value for key, value in flatten(to_dict(config)).items() if value != default[key]}
