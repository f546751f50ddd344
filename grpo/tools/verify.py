"""Replay steps of a run and compare: completions, rewards, advantages, metrics and weights.

    grpo verify --run RUN [--steps 3,17] [--output FILE.json]

A step is trained again from the checkpoint before it, or from the start of the run, with the same seeds. On the same
processor and library versions everything is equal to the bit. Elsewhere, the first difference and its size are
reported. Between a checkpoint and a step lies training: the command says how long that took.
"""

import dataclasses
import json
import logging
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.config.schema import Config
from grpo.errors import ConfigError, Mismatch
from grpo.tools.arguments import command_parser
from grpo.tools.replay import Difference, checkpoint_steps, describe, metrics_by_step, same_rows, train_until

log = logging.getLogger(__name__)

UNCOMPARED = ("time/", "memory/", "eval/", "rollout/tokens_per_second")
"""Beginnings of the metrics that a replay does not repeat: durations and memory; evaluations are not repeated."""
MAX_ROWS = 3
"""Changed rows of the data that are named."""
COMPARED_VERSIONS = ("python", "torch", "transformers", "accelerate", "tokenizers", "grpo-trainer")


@dataclass
class Verification:
    """Result of a replay."""

    steps: list[int] = field(default_factory=list)
    completions: int = 0
    metrics: int = 0
    tensors: int = 0
    """Numbers of things that were compared."""
    differences: list[Difference] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)
    """What differs between the machine of the run and this one."""


def main(argv: list[str]) -> None:
    """Run the command `grpo verify`. Differences are a Mismatch."""
    parser = command_parser("verify", __doc__)
    parser.add_argument("--run", required=True, help="a run directory")
    parser.add_argument("--steps", help="steps to compare, separated by commas (default: the last one)")
    parser.add_argument("--output", help="write the result as JSON")
    options = parser.parse_args(argv)
    steps = None
    if options.steps is not None:
        try:
            steps = sorted({int(word) for word in options.steps.split(",")})
        except ValueError as error:
            raise ConfigError(f"--steps {options.steps}: give numbers separated by commas, such as 3,17") from error
    found = verify(Path(options.run), steps)
    if options.output:
        Path(options.output).write_text(json.dumps(dataclasses.asdict(found), indent=1), encoding="utf-8")
    print(summary(found))
    if found.differences:
        raise Mismatch(f"{options.run} is not what this replay gives: {describe(found.differences[0])}")


def verify(run_dir: Path, steps: list[int] | None = None) -> Verification:
    """Train the steps again, in a temporary directory, and compare them with the record.

    Args:
        run_dir: The run directory. It is only read.
        steps: The steps; None for the last one.

    Raises:
        ConfigError: The folder is no run directory, or does not record a step.
        StorageError: A checkpoint is damaged: its checksums say so before anything is trained.
    """
    from grpo.tools.export import config_of

    config = config_of(run_dir)
    recorded = metrics_by_step(run_dir)
    if not recorded:
        raise ConfigError(f"{run_dir} records no step: there is nothing to verify")
    steps = steps or [max(recorded)]
    for step in steps:
        if step not in recorded:
            raise ConfigError(f"--steps {step}: {run_dir} records steps {min(recorded)} to {max(recorded)}")
    found = Verification(steps=steps)
    last = 0
    while last < steps[-1]:  # from each checkpoint, all steps before the next useful one
        first = next(step for step in steps if step > last)
        start = _checkpoint_before(run_dir, first)
        until = max(step for step in steps if step == first or _checkpoint_before(run_dir, step) == start)
        seconds = sum(recorded[step].get("time/step", 0.0) for step in recorded if start < step <= until)
        log.info("training steps %d to %d again; they took %.0f s in the run", start + 1, until, seconds)
        _replay(run_dir, config, start, until, [step for step in steps if first <= step <= until], found)
        last = until
    found.environment = _environment_changes(run_dir)  # after the replay, which may have switched a kernel off
    return found


def _replay(run_dir: Path, config: Config, start: int, until: int, steps: list[int], found: Verification) -> None:
    """Train from the checkpoint of step `start` to step `until`, and compare `steps`."""
    with tempfile.TemporaryDirectory() as temporary:
        replayed_dir = Path(temporary) / "run"
        checkpoint = run_dir / "checkpoints" / f"step-{start}"
        changed = dataclasses.replace(
            config,
            run_dir=str(replayed_dir),
            resume=str(checkpoint) if start else None,
            eval_every=0,
            save_every=0,
            allow_changes=[],
            tracking=dataclasses.replace(config.tracking, report_to=[], report=False, log_completions=True),
        )
        train_until(changed, until)
        replayed = metrics_by_step(replayed_dir)
        recorded = metrics_by_step(run_dir)
        for step in steps:
            _compare_completions(run_dir, replayed_dir, step, found)
            _compare_metrics(step, recorded[step], replayed[step], found)
        _compare_contents(run_dir, replayed_dir, until, config, found)
        _compare_weights(run_dir, replayed_dir, until, found)


def _checkpoint_before(run_dir: Path, step: int) -> int:
    """Return the step of the newest checkpoint before a step; 0 for the start of the run."""
    return max((saved for saved in checkpoint_steps(run_dir) if saved < step), default=0)


def _compare_completions(run_dir: Path, replayed_dir: Path, step: int, found: Verification) -> None:
    for old, new in same_rows(run_dir, replayed_dir, step):
        found.completions += 1
        for key in old.keys() & new.keys() if old != new else ():
            if old[key] != new[key]:
                what = f"{key} of draw {old.get('draw')}, sample {old.get('sample')}"
                found.differences.append(Difference(step, what, old[key], new[key]))


def _compare_metrics(step: int, old: dict[str, float], new: dict[str, float], found: Verification) -> None:
    for key in sorted(old.keys() & new.keys()):
        if key.startswith(UNCOMPARED):
            continue
        found.metrics += 1
        same = old[key] == new[key] or (_is_nan(old[key]) and _is_nan(new[key]))
        if not same:
            found.differences.append(Difference(step, key, old[key], new[key]))


def _compare_contents(run_dir: Path, replayed_dir: Path, step: int, config: Config, found: Verification) -> None:
    """Compare the checksums of data, base, reference and rewards: those of the newest checkpoint, or of the start."""
    from grpo.run.checkpoint import read_state
    from grpo.tracking.run_reader import RunFolder

    newest = _checkpoint_before(run_dir, 1 << 60)
    old = RunFolder(run_dir).environment().get("derived", {})
    if newest:
        old = read_state(run_dir / "checkpoints" / f"step-{newest}")
    new = read_state(replayed_dir / "checkpoints" / f"step-{step}")
    changed = [
        Difference(step, f"sha256 of {name}", old[kind][name], value)
        for kind in ("contents", "reward_sources")
        for name, value in new[kind].items()
        if name != "held_out" and old.get(kind, {}).get(name, value) != value
    ]
    if any(difference.what == "sha256 of data" for difference in changed):
        changed[1:1] = _changed_rows(run_dir, config)
    new_ones = [
        difference for difference in changed if difference.what not in {each.what for each in found.differences}
    ]
    found.differences = new_ones + found.differences


def _changed_rows(run_dir: Path, config: Config) -> list[Difference]:
    """Return the first rows that the run drew and that the data does not hold as they were."""
    from grpo.data.rows import load_examples
    from grpo.tracking.rollout_reader import rows_of_step
    from grpo.types import question_of

    if config.data.streaming:
        return []

    rows: dict[str, list[dict[str, Any]]] = {}
    for example in load_examples(config.data, "train", config.seed):
        columns = {key: value for key, value in example.columns.items() if key != "question"}
        rows.setdefault(question_of(example.messages), []).append(json.loads(json.dumps(columns, default=str)))
    changed: dict[int, Difference] = {}
    for step in metrics_by_step(run_dir):
        for row in rows_of_step(run_dir / "rollouts.jsonl", step):
            now = rows.get(row["prompt"], [])
            if "columns" in row and row["columns"] not in now and len(changed) < MAX_ROWS:
                what = f"data row of draw {row['draw']}, {row['prompt'][-80:]!r}"
                changed[row["draw"]] = Difference(step, what, row["columns"], now[0] if now else "no such question")
    return list(changed.values())


def _compare_weights(run_dir: Path, replayed_dir: Path, step: int, found: Verification) -> None:
    import torch

    from grpo.run.checkpoint import load_checkpoint

    recorded = run_dir / "checkpoints" / f"step-{step}"
    if not recorded.is_dir():
        return
    old, new = load_checkpoint(recorded)[0], load_checkpoint(replayed_dir / "checkpoints" / f"step-{step}")[0]
    for group in old.keys() & new.keys():
        for name, tensor in old[group].items():
            found.tensors += 1
            other = new[group].get(name)
            if other is None or other.shape != tensor.shape:
                found.differences.append(Difference(step, f"{group} {name}", list(tensor.shape), None))
            elif not torch.equal(tensor, other):
                size = float((tensor.double() - other.double()).abs().max())
                what = f"{group} {name} (largest difference)"
                found.differences.append(Difference(step, what, 0.0, size))


def _environment_changes(run_dir: Path) -> list[str]:
    """Return what differs from the environment that the run recorded."""
    from grpo.tracking.environment import environment
    from grpo.tracking.run_reader import RunFolder

    old, new = RunFolder(run_dir).environment(), environment()
    if not old:
        return ["the run has no environment.json"]
    versions = [(name, old.get("versions", {}).get(name), new["versions"].get(name)) for name in COMPARED_VERSIONS]
    keys = [key for key in ("platform", "processor", "torch_threads", "kernels") if key in old]
    pairs = [*versions, *((key, old[key], new[key]) for key in keys)]
    return [f"{name}: {before} in the run, {now} here" for name, before, now in pairs if before != now]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def summary(found: Verification) -> str:
    """Return the text that the command prints."""
    compared = f"{found.completions} completions, {found.metrics} metrics and {found.tensors} tensors"
    steps = ", ".join(map(str, found.steps))
    lines = [f"step{'s' if len(found.steps) > 1 else ''} {steps}: {compared} compared"]
    lines += [f"another environment: {line}" for line in found.environment]
    if not found.differences:
        return "\n".join([*lines, "all equal to the bit"])
    lines += [describe(difference) for difference in found.differences[:10]]
    more = len(found.differences) - 10
    return "\n".join(lines + ([f"and {more} more differences"] if more > 0 else []))
