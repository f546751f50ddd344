"""Train steps of a run again, for `grpo verify` and `grpo fork`."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config.schema import Config


@dataclass
class Difference:
    """Something that differs between two records of one step."""

    step: int
    what: str
    """The completion, metric or tensor, by name."""
    recorded: Any
    replayed: Any


def train_until(config: Config, until: int) -> None:
    """Train to a step, and save its checkpoint. Messages go to the log alone."""
    from grpo.run.build import build_run
    from grpo.runtime.device import torch_defaults
    from grpo.runtime.signals import Signals
    from grpo.trainer import training_loop

    with Signals() as signals, torch_defaults(), contextlib.redirect_stdout(io.StringIO()):
        run = build_run(config)
        signals.training = True
        try:
            training_loop(run, signals, until=until)
        finally:
            run.close()


def metrics_by_step(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return the rows of metrics.jsonl by step, without that of step 0."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row["step"]: row for row in rows if row["step"]}


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Return the steps of the checkpoints of a run, in their order."""
    names = [path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*")]
    return sorted(int(name) for name in names if name.isdigit())


def same_rows(run_dir: Path, other: Path, step: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the completions of a step in two runs, in pairs of the same draw and sample."""
    from grpo.tracking.rollout_reader import rows_of_step

    before, after = (
        {(row.get("draw"), row.get("sample")): row for row in rows_of_step(folder / "rollouts.jsonl", step)}
        for folder in (run_dir, other)
    )
    return [(row, after[place]) for place, row in before.items() if place in after]


def describe(difference: Difference) -> str:
    """Return one difference as a sentence."""
    size = ""
    if isinstance(difference.recorded, float) and isinstance(difference.replayed, float):
        size = f" (difference {abs(difference.recorded - difference.replayed):.3g})"
    texts = [repr(value)[:120] for value in (difference.recorded, difference.replayed)]
    return f"step {difference.step}, {difference.what}: {texts[0]} recorded, {texts[1]} replayed{size}"
