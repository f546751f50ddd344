"""Continue a run from a checkpoint with one change, and compare it with what the run recorded.

    grpo fork --run RUN --step 20 --set optimizer.learning_rate=2e-5 [--steps 30] [--output DIR]

Both see the same prompts, and each completion is drawn with the same random numbers (common random numbers): as long
as the policies are close, so are their completions, and a difference between the two is mostly the change. The fork is
an ordinary run directory. Step 0 is the start of the run.
"""

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path

from grpo.config.parser import load_config
from grpo.config.schema import Config
from grpo.config.setting import keys_of
from grpo.errors import ConfigError
from grpo.tools.arguments import command_parser
from grpo.tools.replay import Difference, checkpoint_steps, describe, metrics_by_step, same_rows, train_until

log = logging.getLogger(__name__)

SHOWN = ("reward/mean", "eval/accuracy", "rollout/length_mean", "policy/entropy", "policy/kl", "policy/grad_norm")
"""Metrics in the table, where both runs have them."""


@dataclass
class Fork:
    """A fork beside the run that it continues."""

    output: Path
    first: Difference | None = None
    """The completion that differs first. None: all are equal."""
    equal: dict[int, float] = field(default_factory=dict)
    """By step, the share of completions that are the same text."""
    metrics: dict[int, dict[str, tuple[float, float]]] = field(default_factory=dict)
    """By step and metric: the value in the run, and in the fork."""


def main(argv: list[str]) -> None:
    """Run the command `grpo fork`."""
    parser = command_parser("fork", __doc__)
    parser.add_argument("--run", required=True, help="a run directory")
    parser.add_argument("--step", type=int, required=True, help="a checkpoint's step; 0: the start of the run")
    parser.add_argument("--set", nargs="+", required=True, metavar="KEY=VALUE", help="the settings to change")
    parser.add_argument("--steps", type=int, help="the last step of the fork (default: that of the run)")
    parser.add_argument("--output", help="the fork's run directory (default: RUN-fork-STEP beside the run)")
    options = parser.parse_args(argv)
    run_dir = Path(options.run)
    output = Path(options.output) if options.output else run_dir.with_name(f"{run_dir.name}-fork-{options.step}")
    print(summary(fork(run_dir, options.step, options.set, output, options.steps)))


def fork(run_dir: Path, step: int, settings: list[str], output: Path, until: int | None = None) -> Fork:
    """Continue from a checkpoint with other settings, into a new run directory.

    Args:
        run_dir: The run. It is only read.
        step: The step of a checkpoint, or 0.
        settings: "key=value", as flags of `grpo train` without the dashes.
        output: The new run directory.
        until: The last step; None for the last one that the run records.

    Raises:
        ConfigError: There is no such checkpoint, a setting cannot change, or `output` exists.
    """
    recorded = metrics_by_step(run_dir)
    if not recorded:
        raise ConfigError(f"{run_dir} records no step: there is nothing to fork")
    have = checkpoint_steps(run_dir)
    if step and step not in have:
        listed = ", ".join(map(str, have)) or "none"
        raise ConfigError(f"--step {step}: {run_dir} has checkpoints of step {listed}; 0 is the start of the run")
    if output.exists():
        raise ConfigError(f"{output} exists: remove it, or set another --output")
    keys = [setting.partition("=")[0] for setting in settings]
    for setting, key in zip(settings, keys, strict=True):
        if "=" not in setting or key not in keys_of(Config):
            raise ConfigError(f"--set {setting}: give KEY=VALUE with a key of the config, such as objective.beta=0.04")
    config = load_config([f"--config={run_dir / 'config.yaml'}", *(f"--{setting}" for setting in settings)])
    until = until or max(recorded)
    if until <= step:
        raise ConfigError(f"--steps {until}: the fork starts at step {step}, so give a later one")
    config = dataclasses.replace(
        config,
        run_dir=str(output),
        resume=str(run_dir / "checkpoints" / f"step-{step}") if step else None,
        allow_changes=keys if step else [],
    )
    config.tracking = dataclasses.replace(config.tracking, log_completions=True)
    train_until(config, until)
    return compare(run_dir, output, range(step + 1, until + 1))


def compare(run_dir: Path, output: Path, steps: range) -> Fork:
    """Compare the steps of two runs that both recorded them."""
    found = Fork(output)
    before, after = metrics_by_step(run_dir), metrics_by_step(output)
    for step in [step for step in steps if step in before and step in after]:
        pairs = same_rows(run_dir, output, step)
        if pairs:
            equal = [old["completion"] == new["completion"] for old, new in pairs]
            found.equal[step] = sum(equal) / len(equal)
            if found.first is None and not all(equal):
                old, new = pairs[equal.index(False)]
                what = f"completion of draw {old['draw']}, sample {old['sample']}"
                found.first = Difference(step, what, old["completion"], new["completion"])
        shared = before[step].keys() & after[step].keys()
        found.metrics[step] = {key: (before[step][key], after[step][key]) for key in sorted(shared)}
    return found


def summary(found: Fork) -> str:
    """Return the text that the command prints."""
    names = [name for name in SHOWN if any(name in metrics for metrics in found.metrics.values())]
    lines = [
        "| step | equal completions | " + " | ".join(f"{name}: run, fork" for name in names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for step, metrics in found.metrics.items():
        cells = [f"{metrics[name][0]:.4g}, {metrics[name][1]:.4g}" if name in metrics else "" for name in names]
        equal = f"{found.equal[step]:.0%}" if step in found.equal else ""
        lines.append(f"| {step} | {equal} | {' | '.join(cells)} |")
    first = "all completions are equal" if found.first is None else f"differs first: {describe(found.first)}"
    return "\n".join([*lines, first, f"the fork is {found.output}"])
