"""Detection and false alarms of `grpo check --red_team` on planted rewards: a table and a JSON file.

    python benchmarks/red_team.py [--output docs/results/red_team.json]

benchmarks/planted_rewards.py has 20 rewards with a fault and 5 sound ones; five sums of built-in rewards are sound,
too. Each runs alone, on generated word problems. It is detected if a problem or warning of the red team names it; a
problem or warning about a sound one is a false alarm. The faults were written before the attacks were tuned on them,
and the attacks were tuned on them: on faults of other kinds, the rate is not known.
"""

from typing import Any

import planted_rewards
from planted_rewards import BUGGY, SOUND
from shared import RESULTS, character_tokenizer, script_parser, write_json

from grpo.config.schema import DataConfig
from grpo.data.rows import Example, load_examples
from grpo.rewards.scoring import RewardSum
from grpo.runtime.command import run_main
from grpo.tools.check_result import Check
from grpo.tools.check_rewards import check_rewards
from grpo.tools.red_team import search

FILE = planted_rewards.__file__
BUILT_IN = {
    "accuracy": {"accuracy": 1.0},
    "accuracy and xml_format": {"accuracy": 1.0, "xml_format": 0.2},
    "accuracy, right_steps and xml_format": {"accuracy": 1.0, "right_steps": 0.5, "xml_format": 0.2},
    "exact_match": {"exact_match": 1.0},
    "accuracy and length_guard": {"accuracy": 1.0, "length_guard": 0.2},
}


def main() -> None:
    """Attack every reward, and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--output", default=str(RESULTS / "red_team.json"))
    flags = parser.parse_args()
    report = measure()
    write_json(flags.output, report)
    print(table(report))


def measure() -> dict[str, Any]:
    """Return the findings for each reward."""
    rows = load_examples(DataConfig(name="arithmetic"), "train", 0)
    sums = {name: {f"{FILE}:{name}": 1.0} for name in [*BUGGY, *SOUND]} | BUILT_IN
    findings = {name: attacked(rewards, rows) for name, rewards in sums.items()}
    return {"command": "python benchmarks/red_team.py", "findings": findings, "faults": BUGGY}


def attacked(rewards: dict[str, float], rows: list[Example]) -> dict[str, list[str]]:
    """Return the problems and warnings of the check alone, and of the red team."""
    score, tokenizer, found = RewardSum(rewards, {}), character_tokenizer("0123456789"), Check()
    check_rewards(found, score, rows, tokenizer)
    team = search(score, rows, tokenizer, found.form)
    lines = {"check": found.problems + found.warnings, "red_team": team.problems + team.warnings}
    return {kind: [line.replace(f"{FILE}:", "") for line in found_lines] for kind, found_lines in lines.items()}


def table(report: dict[str, Any]) -> str:
    """Return the rates and what was missed, in Markdown."""
    findings = report["findings"]
    lines = ["| | rewards | check alone | check --red_team |", "|---|---|---|---|"]
    for title, names in (("detected", list(BUGGY)), ("false alarms", [*SOUND, *BUILT_IN])):
        alone = sum(bool(findings[name]["check"]) for name in names)
        both = sum(bool(findings[name]["check"] or findings[name]["red_team"]) for name in names)
        lines.append(f"| {title} | {len(names)} | {alone} | {both} |")
    missed = [name for name in BUGGY if not findings[name]["check"] and not findings[name]["red_team"]]
    alarms = [name for name in [*SOUND, *BUILT_IN] if findings[name]["red_team"] or findings[name]["check"]]
    lines += ["", "Missed: " + (", ".join(missed) or "none") + ". False alarms: " + (", ".join(alarms) or "none") + "."]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
