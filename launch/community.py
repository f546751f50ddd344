"""A community in the loop: collect what people say about answers, merge it into the data, train on it, and let a gate decide.

python launch/community.py demo    --root outputs/community [--poison]           the whole loop, on an invented language
python launch/community.py cycle   --root DIR --regression ROWS.jsonl [--base ROWS.jsonl] [--model DIR]   merge, train and gate
python launch/community.py collect --root DIR --prompt TEXT --completion TEXT --verdict accept|reject|correct|withdraw ...
python launch/community.py merge   --root DIR [--base ROWS.jsonl]                feedback.jsonl -> versions/vN
python launch/community.py train   --root DIR --model DIR --output DIR [--grpo_steps 10] [-- --any.train.flag VALUE]
python launch/community.py gate    --root DIR --model OLD --candidate NEW --regression ROWS.jsonl

Everything lies in one folder: feedback.jsonl (chat and dashboard append to it too), versions/, candidates/, gate-N.md, and
current.json, which names the model in use. docs/community.md explains each step.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from grpo.errors import ConfigError
from grpo.runtime.command import run_main

HELD_BACK = 4
"""One corrected row in so many is never trained on: the gate asks it."""
EXTRACTOR = "quoted_terms"
ARCHIVE_RECIPE = {"vocabulary": 500, "steps": 450, "hasty_fraction": 0.0}
"""The demonstration's first model: it answers as the archive does, mistakes included."""


def main() -> None:
    argv, _, train_flags = _split(sys.argv[1:])
    ours = build_parser().parse_args(argv)
    root = Path(ours.root)
    if ours.command == "collect":
        collect(root, ours)
    elif ours.command == "merge":
        merge_into(root, ours.base)
    elif ours.command == "train":
        train_on(root, ours.model, Path(ours.output), ours, train_flags)
    elif ours.command == "gate":
        report = gate_between(root, ours.model, ours.candidate, Path(ours.regression), ours.max_completion_length)
        print(report.read_text(encoding="utf-8"))
    elif ours.command == "cycle":
        cycle(root, ours, train_flags)
    else:
        demo(root, ours, train_flags)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    added = {}
    for name in ("demo", "cycle", "collect", "merge", "train", "gate"):
        added[name] = commands.add_parser(name, allow_abbrev=False)
        added[name].add_argument("--root", required=True, help="the community's folder")
    added["collect"].add_argument("--verdict", choices=["accept", "reject", "correct", "withdraw"])
    for name in (
        "prompt",
        "completion",
        "correction",
        "note",
        "reviewer",
        "licence",
        "pair_id",
        "model_id",
        "withdraws",
    ):
        added["collect"].add_argument(f"--{name}")
    added["collect"].add_argument("--rating", type=int, help="1 to 5")
    added["collect"].add_argument("--consent", action="store_true", help="this may be used to train")
    added["collect"].add_argument("--import", dest="records", help="a JSON list of records from an annotation tool")
    added["collect"].add_argument("--export", help="write all feedback as such a list")
    for name in ("merge", "cycle"):
        added[name].add_argument("--base", help="the archive (JSONL); needed the first time, and becomes v1")
    added["train"].add_argument("--model", required=True, help="the model in use")
    added["train"].add_argument("--output", required=True, help="where the candidate is written")
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
    added["cycle"].add_argument("--model", help="the model in use; needed the first time")
    for name in ("gate", "cycle"):
        added[name].add_argument("--regression", required=True, help="verified rows (JSONL), frozen: never trained on")
    for name in ("gate", "cycle", "demo"):
        added[name].add_argument("--max_completion_length", type=int, default=64)
    added["demo"].add_argument(
        "--poison",
        action="store_true",
        help="then a second cycle with one reviewer, 60 %% wrong, who is then withdrawn",
    )
    return parser


def collect(root: Path, ours: argparse.Namespace) -> None:
    from grpo.tools.community.feedback import (
        append_feedback,
        from_plain_records,
        new_feedback,
        read_feedback,
        to_plain_records,
    )

    path = root / "feedback.jsonl"
    if ours.export:
        records, _ = read_feedback(path)
        Path(ours.export).write_text(
            json.dumps(to_plain_records(records), ensure_ascii=False, indent=1), encoding="utf-8"
        )
    elif ours.records:
        append_feedback(path, *from_plain_records(json.loads(Path(ours.records).read_text(encoding="utf-8"))))
    elif ours.verdict:
        names = ("prompt", "completion", "correction", "note", "reviewer", "licence", "model_id", "withdraws", "rating")
        fields: dict[str, Any] = {name: getattr(ours, name) for name in names if getattr(ours, name) is not None}
        if ours.pair_id is not None:
            fields["pair_id"] = int(ours.pair_id) if ours.pair_id.lstrip("-").isdecimal() else ours.pair_id
        append_feedback(path, new_feedback(ours.verdict, consent=ours.consent, **fields))
    else:
        raise ConfigError("collect: give --verdict (and --prompt ...), --import FILE or --export FILE")
    print(f"{path}: {len(read_feedback(path)[0])} lines of feedback")


def merge_into(root: Path, base: str | None) -> Path:
    """feedback.jsonl + v1 -> the next version, if anything changed."""
    from grpo.data.files import read_table
    from grpo.tools.community.feedback import read_feedback
    from grpo.tools.community.gate import current
    from grpo.tools.community.merge import merge, read_rows_of, versions_in, write_version

    folder = root / "versions"
    if not versions_in(folder):
        if base is None:
            raise ConfigError(f"merge: {folder} holds no version yet: give --base ROWS.jsonl, the archive as it is")
        write_version(folder, merge(read_table(base, "--base").rows, []), {"file": Path(base).name})
    feedback, left_out = read_feedback(root / "feedback.jsonl") if (root / "feedback.jsonl").is_file() else ([], [])
    for reason in left_out:
        print(reason)
    version, new = write_version(folder, merge(read_rows_of(folder / "v1"), feedback))
    for card in [Path(f"{base}.card.yaml"), folder / "v1" / "data_card.yaml"]:
        for each in {version, folder / "v1"}:
            if card.is_file() and not (each / "data_card.yaml").exists():
                shutil.copy(card, each / "data_card.yaml")
    record = json.loads((version / "version.json").read_text(encoding="utf-8"))
    taught_on = (current(root) or {}).get("data")
    if taught_on and "withdrawn" in json.loads((Path(taught_on) / "version.json").read_text(encoding="utf-8")):
        print(
            f"the model in use was taught {taught_on}, of which something was withdrawn since: go on from an earlier model"
        )
    print(f"{version}: {'new' if new else 'nothing has changed'}; {record['rows']} rows, {record['counts']}")
    return version


def parts_of(version: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """-> corrected rows to train on, corrected rows held back for the gate, and rows from before.

    A row from before that holds a word which was corrected away is contested, and in none of them: in another form, or
    another wording, it would teach the mistake again.
    """
    from grpo.rewards.prose import words
    from grpo.tools.community.merge import read_rows_of

    rows = read_rows_of(version)
    corrected = [row for row in rows if row["origin"] == "feedback"]
    gone = {word for row in corrected for text in row["disallowed"] for word in words(text)}
    gone -= {word for row in corrected for word in words(row["answer"])}
    before = [row for row in rows if row["origin"] != "feedback" and not gone & set(words(row["answer"]))]
    return (
        [row for row in corrected if not is_held_back(row)],
        [row for row in corrected if is_held_back(row)],
        before,
    )


def is_held_back(row: dict) -> bool:
    """By its identity, so that a row is held back in every version, or in none."""
    return hashlib.sha256(f"held back {row['pair_id']}".encode()).digest()[0] % HELD_BACK == 0


def train_on(root: Path, model: str, output: Path, ours: argparse.Namespace, train_flags: list[str]) -> Path:
    """The newest version -> a candidate: taught the corrections, then, with --grpo_steps, GRPO on the mix."""
    from grpo.config.schema import DataConfig
    from grpo.data.card import check_permission, record_card
    from grpo.tools.community.merge import versions_in
    from grpo.tools.community.supervised import Continuation, continue_training

    versions = versions_in(root / "versions")
    if not versions:
        raise ConfigError(f"train: {root / 'versions'} holds no version: merge first")
    data = DataConfig(path=str(versions[-1] / "data.jsonl"), i_have_permission=ours.i_have_permission)
    warning = check_permission(data)
    if warning:
        print(warning)
    corrected, held_back, before = parts_of(versions[-1])
    print(f"{versions[-1]}: {len(corrected)} corrected rows, {len(held_back)} held back, {len(before)} from before")
    plan = Continuation(
        steps=ours.steps, share=ours.share, kl=ours.kl, learning_rate=ours.learning_rate, seed=ours.seed
    )
    taught = continue_training(model, corrected, before, output, plan)
    record_card(output, data)
    if ours.grpo_steps == 0:
        return taught
    mix = output / "mix.jsonl"
    repeats = max(1, round(ours.share / (1 - ours.share) * len(before) / len(corrected)))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in corrected * repeats + before]
    mix.write_text("".join(lines), encoding="utf-8")

    from grpo.config.parser import load_config
    from grpo.trainer import train

    flags = {
        "model.name": taught,
        "model.reference": model,
        "data.name": "question_answer",
        "data.path": mix,
        "data.extractor": EXTRACTOR,
        "data.system_prompt": "null",
        "data.i_have_permission": ours.i_have_permission,
        "data.card": versions[-1] / "data_card.yaml" if (versions[-1] / "data_card.yaml").is_file() else "null",
        "rewards": json.dumps({"term_match": 0.6, "chrf": 0.4, "feedback": 0.5}),
        "sampling.max_completion_length": 64,
        "optimizer.learning_rate": 3e-5,
        "steps": ours.grpo_steps,
        "eval_every": 0,
        "save_every": 0,
        "seed": ours.seed,
        "run_dir": output / "grpo",
    }
    return train(load_config([f"--{key}={value}" for key, value in flags.items()] + train_flags)) / "final"


def gate_between(root: Path, model: str, candidate: str, regression: Path, max_completion_length: int) -> Path:
    """Ask both models, decide, and write down why. -> the report."""
    from grpo.data.files import read_table
    from grpo.tools.community.gate import compare, decide, promote
    from grpo.tools.community.merge import versions_in

    version = versions_in(root / "versions")[-1]
    _, held_back, _ = parts_of(version)
    if not held_back:
        raise ConfigError(f"gate: no corrected row of {version} is held back, there is too little feedback to judge by")
    verified = read_table(str(regression), "--regression").rows
    trained_on = {row["question"] for part in parts_of(version)[::2] for row in part}
    both = [row["question"] for row in verified if row["question"] in trained_on]
    if both:
        raise ConfigError(
            f"--regression: {len(both)} of its rows are trained on, the first is {both[0]!r}: take them out"
        )
    right = {
        path: (rights(path, held_back, max_completion_length), rights(path, verified, max_completion_length))
        for path in (model, candidate)
    }
    on_feedback, on_verified = (compare(right[model][part], right[candidate][part]) for part in (0, 1))
    return promote(root, decide(on_feedback, on_verified), model, candidate, str(version))


def rights(model: str, rows: list[dict], max_completion_length: int) -> list[bool]:
    """Whether a model answers each row with exactly the gold terms, greedily."""
    from grpo.config.schema import DataConfig
    from grpo.data.files import table_of
    from grpo.data.rows import BadRows, load_rows
    from grpo.data.stream import render_prompts
    from grpo.data.tokenizer import load_tokenizer
    from grpo.models.loading import load_model
    from grpo.models.logprob_model import use_grpo_attention
    from grpo.models.strategies.registry import start_accelerator
    from grpo.rollout.engine import build_engine
    from grpo.rollout.evaluation import evaluate

    accelerator, tokenizer, policy = start_accelerator(), load_tokenizer(model), load_model(model)
    examples = load_rows(table_of("gate", rows), DataConfig(extractor=EXTRACTOR, system_prompt=None), BadRows())
    prompts, _ = render_prompts(examples, tokenizer, None)
    uses_packed_attention = use_grpo_attention(policy)
    policy.to(accelerator.device)
    engine = build_engine("native", policy, tokenizer, slots=256, uses_packed_attention=uses_packed_attention)
    found = evaluate(engine, prompts, accelerator, max_completion_length=max_completion_length, prose=True)
    return [row["accuracy"] == 1.0 for row in found.rows]


def cycle(root: Path, ours: argparse.Namespace, train_flags: list[str]) -> Path | None:
    """What was said up to now -> a new version, a candidate, the gate's report; None where nothing new was said."""
    from grpo.tools.community.gate import current, set_current

    version = merge_into(root, ours.base)
    if ours.model is not None:
        set_current(root, ours.model)
    in_use = current(root)
    if in_use is None:
        raise ConfigError(f"cycle: {root / 'current.json'} names no model in use yet: give --model DIR")
    output = root / "candidates" / version.name
    if output.exists():
        print(f"{version} was tried already: {output}")
        return None
    candidate = train_on(root, in_use["model"], output, ours, train_flags)
    report = gate_between(root, in_use["model"], str(candidate), Path(ours.regression), ours.max_completion_length)
    print(report.read_text(encoding="utf-8"))
    return report


def demo(root: Path, ours: argparse.Namespace, train_flags: list[str]) -> None:
    """The whole loop: an archive in which 50 of 100 nouns are wrong, 200 corrections of them, a candidate, the gate. With
    --poison: what one reviewer then gets wrong is kept out, and, withdrawn, leaves no trace."""
    from grpo.models.tiny import ProseRecipe, make_tiny_model
    from grpo.tools.community.feedback import append_feedback, new_feedback
    from grpo.tools.community.gate import set_current
    from grpo.tools.community.invented_community import make_community
    from grpo.tools.community.merge import read_rows_of

    if (root / "feedback.jsonl").exists():
        raise ConfigError(f"--root {root} holds a community already: choose another folder for the demonstration")
    community = make_community(ours.seed)
    root.mkdir(parents=True, exist_ok=True)
    for name, rows in (("archive", community.archive), ("verified", community.verified)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (root / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (root / "archive.jsonl.card.yaml").write_text(
        "source: generated by grpo/tools/community/invented_community.py\nlicence: CC0-1.0\npermission: granted\n"
    )
    recipe = ProseRecipe(**ARCHIVE_RECIPE)
    set_current(root, str(make_tiny_model(seed=ours.seed, problems=community.archive, recipe=recipe)))
    ours.base, ours.regression, ours.model = str(root / "archive.jsonl"), str(root / "verified.jsonl"), None
    print(f"== {len(community.corrections)} corrections by people who know the language")
    append_feedback(root / "feedback.jsonl", *community.corrections)
    cycle(root, ours, train_flags)
    if not ours.poison:
        return
    print(f"== {len(community.poison)} corrections by one reviewer, 60 % of them wrong")
    append_feedback(root / "feedback.jsonl", *community.poison)
    cycle(root, ours, train_flags)
    print("== that reviewer is withdrawn")
    append_feedback(root / "feedback.jsonl", new_feedback("withdraw", reviewer=community.poison[0].reviewer))
    version = merge_into(root, ours.base)
    same = read_rows_of(version) == read_rows_of(root / "versions" / "v2")
    print(f"{version} holds {'the same rows as' if same else 'other rows than'} v2")


def _split(argv: list[str]) -> tuple[list[str], str, list[str]]:
    """What stands after "--" is for launch/train.py."""
    if "--" not in argv:
        return argv, "", []
    at = argv.index("--")
    return argv[:at], "--", argv[at + 1 :]


if __name__ == "__main__":
    run_main(main)
