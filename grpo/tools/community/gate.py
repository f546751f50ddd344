"""Gate: compare a candidate with the model in use on the same questions, and decide which one to use.

The candidate is promoted only if both conditions hold at 95 % confidence:

    feedback     it is right more often on held-out corrections: McNemar's exact test, p < 0.05
    regression   it lost at most one point on a frozen set of verified answers: the 95 % bound of the loss, by a paired
                 bootstrap over the questions, is at most 0.01

Otherwise the model in use stays, and the report names the condition that failed, with its numbers.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from grpo.errors import ConfigError, StorageError
from grpo.runtime.statistics import mcnemar

TOLERANCE = 0.01
CONFIDENCE = 0.95
RESAMPLES = 10_000
NEEDED = 6
"""Fewest held-back questions with which the gate can pass: 2 / 2^6 = 0.031, but 2 / 2^5 = 0.0625."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the same questions."""

    questions: int
    old: float
    new: float
    """Fractions of right answers."""
    gained: int
    lost: int
    """Questions that only the new model, or only the old one, answered right."""
    mcnemar_p: float
    largest_loss: float
    """Upper bound of old - new at 95 % (one-sided)."""


@dataclass(frozen=True)
class Decision:
    """The gate's decision with the comparisons behind it."""

    promote: bool
    reasons: list[str]
    """Conditions that failed."""
    feedback: Comparison
    regression: Comparison


def compare(old: list[bool], new: list[bool], seed: int = 0) -> Comparison:
    """Compare two models question by question.

    Args:
        old: Whether the model in use is right, per question.
        new: The same for the candidate.
        seed: Seed of the bootstrap.

    Raises:
        ConfigError: The lists are empty or differ in length.
    """
    if not old or len(old) != len(new):
        raise ConfigError(
            f"{len(old)} and {len(new)} answers to compare: the gate needs the same questions, at least one"
        )
    before, after = numpy.array(old, dtype=float), numpy.array(new, dtype=float)
    gained, lost = int((after > before).sum()), int((after < before).sum())
    chance = numpy.random.Generator(numpy.random.PCG64(seed))
    picks = chance.integers(0, len(old), size=(RESAMPLES, len(old)), dtype=numpy.int32)
    losses = (before - after)[picks].mean(axis=1)
    return Comparison(
        questions=len(old),
        old=float(before.mean()),
        new=float(after.mean()),
        gained=gained,
        lost=lost,
        mcnemar_p=mcnemar(lost, gained),
        largest_loss=float(numpy.quantile(losses, CONFIDENCE)),
    )


def decide(feedback: Comparison, regression: Comparison) -> Decision:
    """Decide on promotion, with a reason for each condition that fails."""
    reasons = []
    if feedback.questions < NEEDED:
        reasons.append(
            f"{feedback.questions} held-back questions are too few: even if all were gained, p would be "
            f"{2 / 2**feedback.questions:.3f}; {NEEDED} are needed. Collect more feedback"
        )
    elif not (feedback.gained > feedback.lost and feedback.mcnemar_p < 1 - CONFIDENCE):
        reasons.append(
            f"held-out feedback did not improve: {feedback.old:.1%} -> {feedback.new:.1%} of {feedback.questions} "
            f"({feedback.gained} gained, {feedback.lost} lost, p = {feedback.mcnemar_p:.3f}, needs < 0.05)"
        )
    if regression.largest_loss > TOLERANCE:
        reasons.append(
            f"the frozen regression set may have fallen by more than a point: {regression.old:.1%} -> "
            f"{regression.new:.1%} of {regression.questions} ({regression.gained} gained, {regression.lost} lost; "
            f"at 95 % the loss is up to "
            f"{100 * regression.largest_loss:.1f} points, 1.0 is allowed)"
        )
    return Decision(not reasons, reasons, feedback, regression)


def promote(root: Path, decision: Decision, old: str, new: str, data: str) -> Path:
    """Record a decision in gate-N.json and gate-N.md, and set the model in use.

    Args:
        root: The community's folder.
        decision: The decision.
        old: The model in use.
        new: The candidate.
        data: The version of the data that the candidate was trained on.

    Returns:
        The path of gate-N.md.

    Raises:
        StorageError: A file cannot be written.
    """
    number = len(list(root.glob("gate-*.json"))) + 1
    in_use = new if decision.promote else old
    verdict = f"promoted: {new}" if decision.promote else f"kept: {old}. {'; '.join(decision.reasons)}"
    lines = [
        "# Gate",
        "",
        verdict,
        "",
        "| set | questions | old | new | gained | lost | p (McNemar) | largest loss at 95 % |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, found in (("held-out feedback", decision.feedback), ("frozen regression", decision.regression)):
        lines.append(
            f"| {name} | {found.questions} | {found.old:.1%} | {found.new:.1%} | {found.gained} | {found.lost} | "
            f"{found.mcnemar_p:.2g} | {_loss(found)} |"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        record = {"old": old, "new": new, "data": data, **asdict(decision)}
        (root / f"gate-{number}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        report = root / f"gate-{number}.md"
        report.write_text("\n".join(lines) + "\n", encoding="utf-8")
        set_current(root, in_use, data if decision.promote else None)
    except OSError as error:
        raise StorageError(f"cannot write the gate's decision to {root}: {error}") from error
    return report


def _loss(found: Comparison) -> str:
    """Return the bound of the loss in words: "1.2 points", "none: at least 3.0 points gained"."""
    points = 100 * found.largest_loss
    return (
        f"{points:.1f} points"
        if points > 0
        else f"none: at least {-points:.1f} points gained"
        if points < 0
        else "none"
    )


def set_current(root: Path, model: str, data: str | None = None) -> None:
    """Write the model in use to current.json, atomically."""
    known: dict[str, Any] = current(root) or {}
    temporary = root / ".current.json"
    temporary.write_text(json.dumps(known | {"model": model} | ({"data": data} if data else {}), indent=1))
    os.replace(temporary, root / "current.json")


def current(root: Path) -> dict[str, Any] | None:
    """Return the contents of current.json: {"model": ..., "data": ...}, or None."""
    path = root / "current.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
