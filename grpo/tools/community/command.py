"""Improve a model with human feedback in cycles: collect judgements, merge them into the data, train, decide.

    grpo community demo    --root outputs/community [--poison]       the whole cycle, on an invented language
    grpo community cycle   --root DIR --regression ROWS.jsonl [--base ROWS.jsonl] [--model DIR]
    grpo community collect --root DIR --prompt TEXT --completion TEXT --verdict accept|reject|correct|withdraw ...
    grpo community merge   --root DIR [--base ROWS.jsonl]            feedback.jsonl -> versions/vN
    grpo community train   --root DIR --model DIR --output DIR [--grpo_steps 10] [-- --any.train.flag VALUE]
    grpo community gate    --root DIR --model OLD --candidate NEW --regression ROWS.jsonl

One folder holds everything: feedback.jsonl (chat and dashboard append to it too), versions/, candidates/, gate-N.md,
and current.json with the model in use. docs/community.md explains each step.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from grpo.errors import ConfigError
from grpo.tools.arguments import command_parser

COLLECTED = ["prompt", "completion", "correction", "note", "reviewer", "licence", "pair_id", "model_id", "withdraws"]


def main(argv: list[str]) -> None:
    """Run the command `grpo community`. Arguments after "--" are config flags of the GRPO steps."""
    at = argv.index("--") if "--" in argv else len(argv)
    options = build_parser().parse_args(argv[:at])
    root = Path(options.root)
    if options.command == "collect":
        collect(root, options)
        return
    from grpo.tools.community import cycle
    from grpo.tools.community.demo import run_demo
    from grpo.tools.community.supervised import Continuation

    if options.command == "merge":
        cycle.merge_feedback(root, options.base)
        return
    if options.command == "gate":
        regression = Path(options.regression)
        report = cycle.gate_candidate(root, options.model, options.candidate, regression, options.max_completion_length)
        print(report.read_text(encoding="utf-8"))
        return
    supervised = Continuation(
        steps=options.steps,
        share=options.share,
        kl=options.kl,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    recipe = cycle.Recipe(
        supervised,
        grpo_steps=options.grpo_steps,
        i_have_permission=options.i_have_permission,
        train_flags=tuple(argv[at + 1 :]),
    )
    if options.command == "train":
        cycle.train_candidate(root, options.model, Path(options.output), recipe)
    elif options.command == "cycle":
        regression = Path(options.regression)
        cycle.run_cycle(root, recipe, regression, options.base, options.model, options.max_completion_length)
    else:
        run_demo(root, recipe, options.max_completion_length, poison=options.poison)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with its six subcommands."""
    parser = command_parser("community", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    added = {}
    for name in ("demo", "cycle", "collect", "merge", "train", "gate"):
        added[name] = commands.add_parser(name, allow_abbrev=False)
        added[name].add_argument("--root", required=True, help="the community's folder")
    collect = added["collect"]
    collect.add_argument("--verdict", choices=["accept", "reject", "correct", "withdraw"])
    for name in COLLECTED:
        collect.add_argument(f"--{name}")
    collect.add_argument("--rating", type=int, help="1 to 5")
    collect.add_argument("--consent", action="store_true", help="this may be used to train")
    collect.add_argument("--import", dest="records", help="a JSON list of records from an annotation tool")
    collect.add_argument("--export", help="write all feedback as such a list")
    for name in ("merge", "cycle"):
        added[name].add_argument("--base", help="the archive (JSONL); required the first time, becomes v1")
    added["train"].add_argument("--model", required=True, help="the model in use")
    added["train"].add_argument("--output", required=True, help="the folder to write the candidate to")
    for name in ("train", "cycle", "demo"):
        added[name].add_argument("--steps", type=int, default=200, help="supervised steps on the mix")
        added[name].add_argument("--share", type=float, default=0.5, help="corrected rows in the mix")
        added[name].add_argument("--kl", type=float, default=0.3, help="weight of the KL to the previous model")
        added[name].add_argument("--learning_rate", type=float, default=1e-3)
        added[name].add_argument("--grpo_steps", type=int, default=0, help="GRPO steps on the mix afterwards")
        added[name].add_argument("--seed", type=int, default=0)
        added[name].add_argument(
            "--i_have_permission", action="store_true", help="you state that the data's stewards permit this"
        )
    added["gate"].add_argument("--model", required=True, help="the model in use")
    added["gate"].add_argument("--candidate", required=True)
    added["cycle"].add_argument("--model", help="the model in use; required the first time")
    for name in ("gate", "cycle"):
        added[name].add_argument("--regression", required=True, help="verified rows (JSONL), never trained on")
    for name in ("gate", "cycle", "demo"):
        added[name].add_argument("--max_completion_length", type=int, default=64)
    added["demo"].add_argument(
        "--poison",
        action="store_true",
        help="add a second cycle with one reviewer who is 60 %% wrong, then withdraw that reviewer's feedback",
    )
    return parser


def collect(root: Path, options: argparse.Namespace) -> None:
    """Add one judgement, import records, or export all feedback."""
    from grpo.tools.community.feedback import from_plain_records, new_feedback, to_plain_records
    from grpo.tools.community.feedback_file import append_feedback, read_feedback

    path = root / "feedback.jsonl"
    if options.export:
        records, _ = read_feedback(path)
        text = json.dumps(to_plain_records(records), ensure_ascii=False, indent=1)
        Path(options.export).write_text(text, encoding="utf-8")
    elif options.records:
        append_feedback(path, *from_plain_records(json.loads(Path(options.records).read_text(encoding="utf-8"))))
    elif options.verdict:
        given: dict[str, Any] = {name: getattr(options, name) for name in (*COLLECTED, "rating")}
        fields = {name: value for name, value in given.items() if value is not None}
        if str(fields.get("pair_id", "")).lstrip("-").isdecimal():
            fields["pair_id"] = int(fields["pair_id"])
        append_feedback(path, new_feedback(options.verdict, consent=options.consent, **fields))
    else:
        raise ConfigError("collect: give --verdict (and --prompt ...), --import FILE or --export FILE")
    print(f"{path}: {len(read_feedback(path)[0])} lines of feedback")
