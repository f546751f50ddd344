"""One cycle: feedback -> a new version of the data -> a candidate model -> the gate's decision."""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from grpo.config.parser import load_config
from grpo.config.schema import Config, DataConfig, SamplingConfig
from grpo.data.card import check_permission, record_card
from grpo.data.files import BadRows, read_table, table_of
from grpo.data.rows import load_rows
from grpo.errors import ConfigError
from grpo.models.strategies.registry import start_accelerator
from grpo.rewards.prose import words
from grpo.tools.community.feedback_file import read_feedback
from grpo.tools.community.gate import NEEDED, compare, current, decide, promote, set_current
from grpo.tools.community.merge import merge, read_rows_of, versions_in, write_version
from grpo.tools.community.supervised import Continuation, continue_training
from grpo.tools.evaluate_model import Evaluator
from grpo.trainer import train

log = logging.getLogger(__name__)

HELD_BACK = 4
"""One corrected row of this many is not trained on: the gate evaluates on it."""
EXTRACTOR = "quoted_terms"
GRPO_REWARDS = {"term_match": 0.6, "chrf": 0.4, "feedback": 0.5}


@dataclass(frozen=True)
class Recipe:
    """Settings of one training: supervised steps on the mix, then GRPO steps."""

    supervised: Continuation = Continuation()
    grpo_steps: int = 0
    i_have_permission: bool = False
    """The user states that the data's stewards permit the training."""
    train_flags: tuple[str, ...] = ()
    """Config flags of the GRPO steps."""


def run_cycle(
    root: Path,
    recipe: Recipe,
    regression: Path,
    base: str | None = None,
    model: str | None = None,
    max_completion_length: int = 64,
) -> Path | None:
    """Merge all feedback, train a candidate on it, and let the gate decide.

    Args:
        root: The community's folder.
        recipe: Training settings.
        regression: Verified rows (JSONL), which must not be among the training rows.
        base: The archive; required the first time.
        model: The model in use; required the first time.
        max_completion_length: Tokens per answer at the gate.

    Returns:
        The gate's report, or None if this version of the data was tried before.
    """
    version = merge_feedback(root, base)
    if model is not None:
        set_current(root, model)
    in_use = current(root)
    if in_use is None:
        raise ConfigError(f"cycle: {root / 'current.json'} names no model in use yet: give --model DIR")
    output = root / "candidates" / version.name
    if output.exists():
        print(f"{version} was tried already: {output}")
        return None
    held_back = len(split_rows(version)[1])
    if held_back < NEEDED:
        print(
            f"warning: {held_back} corrected rows are held back for the gate, which can only promote with at least "
            f"{NEEDED}: the candidate will be trained and compared, and the model in use stays. Collect more feedback"
        )
    candidate = train_candidate(root, in_use["model"], output, recipe)
    report = gate_candidate(root, in_use["model"], str(candidate), regression, max_completion_length)
    print(report.read_text(encoding="utf-8"))
    return report


def merge_feedback(root: Path, base: str | None) -> Path:
    """Make the next version of the data from v1 and all feedback. Return the newest version's folder."""
    folder = root / "versions"
    if not versions_in(folder):
        if base is None:
            raise ConfigError(f"merge: {folder} holds no version yet: give --base ROWS.jsonl, the archive as it is")
        write_version(folder, merge(read_table(base, "--base").rows, []), {"file": Path(base).name})
    feedback, left_out = read_feedback(root / "feedback.jsonl") if (root / "feedback.jsonl").is_file() else ([], [])
    for reason in left_out:
        print(reason)
    version, new = write_version(folder, merge(read_rows_of(folder / "v1"), feedback))
    _copy_card(base, version, folder / "v1")
    record = json.loads((version / "version.json").read_text(encoding="utf-8"))
    used = (current(root) or {}).get("data")
    if used and "withdrawn" in json.loads((Path(used) / "version.json").read_text(encoding="utf-8")):
        print(
            f"the model in use was trained on {used}, of which feedback was withdrawn: continue from an earlier model"
        )
    print(f"{version}: {'new' if new else 'nothing has changed'}; {record['rows']} rows, {record['counts']}")
    return version


def _copy_card(base: str | None, version: Path, first: Path) -> None:
    for card in [Path(f"{base}.card.yaml"), first / "data_card.yaml"]:
        for each in {version, first}:
            if card.is_file() and not (each / "data_card.yaml").exists():
                shutil.copy(card, each / "data_card.yaml")


def split_rows(version: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """Split a version's rows.

    A row without feedback that contains a word which a correction removed belongs to no part: in another form or
    wording it would teach the same mistake again.

    Returns:
        Corrected rows to train on, corrected rows held back for the gate, and rows without feedback.
    """
    rows = read_rows_of(version)
    corrected = [row for row in rows if row["origin"] == "feedback"]
    removed = {word for row in corrected for text in row["disallowed"] for word in words(text)}
    removed -= {word for row in corrected for word in words(row["answer"])}
    unchanged = [row for row in rows if row["origin"] != "feedback" and not removed & set(words(row["answer"]))]
    held_back = [row for row in corrected if is_held_back(row)]
    return [row for row in corrected if not is_held_back(row)], held_back, unchanged


def is_held_back(row: dict) -> bool:
    """Return whether the gate keeps a row. Decided by its identity, so it is the same in every version."""
    return hashlib.sha256(f"held back {row['pair_id']}".encode()).digest()[0] % HELD_BACK == 0


def train_candidate(root: Path, model: str, output: Path, recipe: Recipe) -> Path:
    """Train `model` on the newest version of the data.

    Returns:
        The candidate's folder: `output`, or the final/ of the GRPO run where recipe.grpo_steps is set.
    """
    versions = versions_in(root / "versions")
    if not versions:
        raise ConfigError(f"train: {root / 'versions'} holds no version: merge first")
    version = versions[-1]
    data = DataConfig(path=str(version / "data.jsonl"), i_have_permission=recipe.i_have_permission)
    warning = check_permission(data)
    if warning:
        log.warning(warning)
    corrected, held_back, unchanged = split_rows(version)
    print(f"{version}: {len(corrected)} corrected rows, {len(held_back)} held back, {len(unchanged)} from before")
    candidate = continue_training(model, corrected, unchanged, output, recipe.supervised)
    record_card(output, data)
    if recipe.grpo_steps == 0:
        return candidate
    share = recipe.supervised.share
    repeats = max(1, round(share / (1 - share) * len(unchanged) / len(corrected)))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in corrected * repeats + unchanged]
    mix = output / "mix.jsonl"
    mix.write_text("".join(lines), encoding="utf-8")
    card = version / "data_card.yaml"
    flags = {
        "model.name": candidate,
        "model.reference": model,
        "data.name": "question_answer",
        "data.path": mix,
        "data.extractor": EXTRACTOR,
        "data.system_prompt": "null",
        "data.i_have_permission": recipe.i_have_permission,
        "data.card": card if card.is_file() else "null",
        "rewards": json.dumps(GRPO_REWARDS),
        "sampling.max_completion_length": 64,
        "optimizer.learning_rate": 3e-5,
        "steps": recipe.grpo_steps,
        "eval_every": 0,
        "save_every": 0,
        "seed": recipe.supervised.seed,
        "run_dir": output / "grpo",
    }
    config = load_config([*(f"--{key}={value}" for key, value in flags.items()), *recipe.train_flags])
    return train(config) / "final"


def gate_candidate(root: Path, model: str, candidate: str, regression: Path, max_completion_length: int) -> Path:
    """Evaluate both models, decide, and record the decision. Return the report's path."""
    version = versions_in(root / "versions")[-1]
    corrected, held_back, unchanged = split_rows(version)
    if not held_back:
        raise ConfigError(f"gate: no corrected row of {version} is held back: collect more feedback first")
    verified = read_table(str(regression), "--regression").rows
    trained_on = {row["question"] for row in corrected + unchanged}
    both = [row["question"] for row in verified if row["question"] in trained_on]
    if both:
        raise ConfigError(
            f"--regression: {len(both)} of its rows are trained on, the first is {both[0]!r}: remove them"
        )
    right = {
        path: [answers_right(path, rows, max_completion_length) for rows in (held_back, verified)]
        for path in (model, candidate)
    }
    on_feedback, on_verified = (compare(right[model][part], right[candidate][part]) for part in (0, 1))
    return promote(root, decide(on_feedback, on_verified), model, candidate, str(version))


def answers_right(model: str, rows: list[dict], max_completion_length: int) -> list[bool]:
    """Return for each row whether the model's greedy answer has exactly the gold terms."""
    config = Config(
        data=DataConfig(extractor=EXTRACTOR, system_prompt=None, max_prompt_length=None),
        sampling=SamplingConfig(max_completion_length=max_completion_length),
    )
    examples = load_rows(table_of("gate", rows), config.data, BadRows())
    found = Evaluator.load(config, model, examples, start_accelerator()).evaluate(samples=1, temperature=0.0)
    return [row["accuracy"] == 1.0 for row in found.rows]
