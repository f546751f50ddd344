"""Print the findings of a check in the terminal, problems and rewards without a signal in red."""

from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo.runtime.messages import visible
from grpo.tools.check_result import Check, PromptCheck, RedTeam, TurnPart
from grpo.tools.forecast_result import Forecast
from grpo.tools.forecast_statistics import Interval

MAX_PROMPT_TEXT = 1500
"""Characters of a prompt that are shown."""
MAX_REJECTED = 3
"""Rejected rows that are shown."""
SHOWN_ATTEMPTS = 5
MAX_ATTEMPT_TEXT = 200
PART_STYLES = {"prompt": "dim", "sampled": "green", "given": "yellow"}
KINDS = ("gold", "wrong", "empty", "hostile")


def show(found: Check, changed: dict[str, Any], *, everything: bool = False) -> None:
    """Print the findings.

    Args:
        found: The findings.
        changed: The settings whose values are not the defaults.
        everything: Print the settings that are the defaults, too.
    """
    printer = Printer()
    _show_config(printer, found, changed, everything)
    _show_data(printer, found)
    printer.heading("batch")
    printer.line(found.batch)
    printer.heading("rewards")
    printer.console.print(_reward_table(found))
    if found.form:
        printer.line(f"gold and wrong answers are written in the form that these rewards score highest: {found.form}")
    if found.red_team is not None:
        _show_red_team(printer, found.red_team)
    _show_cost(printer, found)
    if found.forecast is not None:
        _show_forecast(printer, found.forecast)
    for warning in found.warnings:
        printer.line(f"warning: {warning}", "bold red" if warning.startswith(("reward '", "a right")) else "yellow")
    for problem in found.problems:
        printer.line(f"problem: {problem}", "bold red")
    if not found.problems:
        printer.line("ready to train", "bold green")


class Printer:
    """Prints lines and headings as plain text: markup in them is not interpreted."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=False)
        if not self.console.is_terminal:  # rich assumes 80 columns for a pipe or a file, which cuts the table off
            self.console.width = max(self.console.width, 120)

    def heading(self, text: str) -> None:
        """Print a heading."""
        self.console.print(Text(text, style="bold"))

    def line(self, text: str, style: str = "") -> None:
        """Print an indented line."""
        self.console.print(Text("  " + visible(text), style=style), soft_wrap=True)


def _show_config(printer: Printer, found: Check, changed: dict[str, Any], everything: bool) -> None:
    printer.heading("config")
    settings = ", ".join(f"{key} {_yaml(value)}" for key, value in changed.items())
    printer.line("not the defaults: " + (settings or "nothing"))
    for section, values in _sections(found.config).items() if everything else ():
        printer.line(f"{section}: " + ", ".join(f"{key} {_yaml(value)}" for key, value in values.items()), "dim")
    if not everything:
        printer.line(f"the other {len(found.config) - len(changed)} keys: --all", "dim")
    printer.line(f"run directory {found.run_dir}")


def _show_data(printer: Printer, found: Check) -> None:
    printer.heading("data")
    printer.line(found.data.removeprefix("data: "))
    for row in found.rejected[:MAX_REJECTED]:
        printer.line(f"left out: {row['place']}: {row['reason']}", "yellow")
    printer.line(f"{found.held_out:,} rows held out")
    spread = ", ".join(f"{name} {value}" for name, value in found.lengths.items())
    measured = "" if found.measured == found.rows else f" (of {found.measured:,} rows at equal distances)"
    printer.line(f"prompt tokens{measured}: {spread}; {found.too_long} left out as too long")
    printer.line(f"{found.duplicates} repeated questions, {found.overlap} held-out questions among the training rows")
    for number, prompt in enumerate(found.prompts, start=1):
        printer.console.print(_prompt_panel(number, prompt))
    if found.conversation:
        printer.heading("turns")
        printer.console.print(_conversation_panel(found.conversation))


def _conversation_panel(parts: list[TurnPart]) -> Panel:
    text = Text()
    for part in parts:
        text.append(f"[{part.kind}: {part.tokens} tokens]\n", style="bold")
        text.append(visible(part.text.rstrip("\n")) + "\n", style=PART_STYLES[part.kind])
    text.rstrip()
    return Panel(text, title="one conversation: sampled tokens are trained, given ones are context", title_align="left")


def _prompt_panel(number: int, prompt: PromptCheck) -> Panel:
    text = prompt.text if len(prompt.text) <= MAX_PROMPT_TEXT else prompt.text[:MAX_PROMPT_TEXT] + "..."
    answer = "none" if prompt.answer is None else prompt.answer
    title = f"prompt {number}: {prompt.tokens} tokens, gold answer {answer}"
    return Panel(Text(visible(text)), title=Text(visible(title)), title_align="left")


def _show_red_team(printer: Printer, found: RedTeam) -> None:
    printer.heading("red team")
    right = "" if found.right is None else f"; a right answer earns {found.right.total:.3f}"
    printer.line(f"{found.tried:,} completions on {found.rows} rows{right}. The wrong ones that earn most:")
    table = Table()
    for heading in ("attack", "earns", "text"):
        table.add_column(heading, justify="right" if heading == "earns" else "left", overflow="fold")
    for attempt in found.attempts[:SHOWN_ATTEMPTS]:
        cells = (attempt.name, f"{attempt.total:.3f}", repr(attempt.text[:MAX_ATTEMPT_TEXT])[1:-1])
        table.add_row(*(Text(visible(cell)) for cell in cells))
    printer.console.print(table)


def _show_cost(printer: Printer, found: Check) -> None:
    printer.heading("memory and time")
    parts = ", ".join(f"{name} {value:.3f} GiB" for name, value in found.memory.items() if name != "peak")
    printer.line(f"{found.parameters / 1e6:,.1f} million parameters; {parts}")
    printer.line(
        f"peak {found.memory['peak']:.2f} GiB per process, without the program itself (on a GPU: the CUDA context)"
    )
    seconds = found.least_seconds_per_step
    printer.line(
        f"at least {seconds:.3g} s per step, {duration(seconds * found.steps)} for {found.steps:,} steps: the time of "
        f"the matrix products alone at the {found.matrix_rate / 1e9:,.0f} GFLOP/s measured here"
    )


def _show_forecast(printer: Printer, found: Forecast) -> None:
    printer.heading("forecast, with 90 % intervals")
    printer.line(
        f"measured in {duration(found.seconds_measured)}, and discarded: {found.completions:,} completions in "
        f"{found.groups} groups ({found.groups_now} of the policy as it is now), {found.trained_steps} training steps"
    )
    printer.line(f"pass rate now ({found.passing} >= {found.threshold:g}) {_interval(found.pass_rate, '.2f')}")
    rates = ", ".join(f"{name} {_interval(share, '.0%')}" for name, share in found.pass_rates.items())
    printer.line(f"share of prompts by their completions that pass: {rates}")
    printer.line(
        f"flat groups now {_interval(found.flat, '.0%')}: {found.flat_passed} of {found.groups_now} where all pass, "
        f"{found.flat_failed} where all fail"
    )
    sizes = ", ".join(f"{size}: {_interval(share, '.0%')}" for size, share in found.flat_by_size.items())
    printer.line(f"expected flat groups by sampling.num_generations: {sizes or 'unknown, as no reward varied'}")
    smallest = "unknown, or above 1024" if found.smallest_size is None else _interval(found.smallest_size, ".0f")
    printer.line(f"smallest num_generations for less than {found.flat_share:.0%} flat groups: {smallest}")
    printer.line(
        f"completion tokens now: mean {_interval(found.length, '.1f')}, median {found.length_median}, 95 % "
        f"{found.length_95}; cut off at {found.length_limit}: {_interval(found.truncated, '.0%')}"
    )
    phases = ", ".join(f"{name} {seconds:.2g}" for name, seconds in found.phases.items())
    printer.line(
        f"seconds per step {_interval(found.seconds, '.3g')} (first one {found.first_seconds.value:.3g}): {phases}"
    )
    ends = (duration(3600 * hours) for hours in (found.hours.value, found.hours.low, found.hours.high))
    printer.line(
        f"{found.steps_left:,} steps to the end: {'{} [{}, {}]'.format(*ends)}, without evaluations and checkpoints, "
        "while completions keep their length"
    )
    printer.line(
        f"peak memory {found.peak_gib:.2f} GiB, {found.free_gib:.2f} GiB free; largest batch {found.largest_batch:,} "
        f"tokens, {found.batches_per_step:.1f} batches per step"
    )
    table = Table()
    for heading in ("step from now", "seconds", "flat groups", "mean completion tokens"):
        table.add_column(heading, justify="right")
    for step in found.next_steps:
        cells = (_interval(step.seconds, ".3g"), _interval(step.flat, ".0%"), _interval(step.length, ".1f"))
        table.add_row(str(step.step), *(Text(cell) for cell in cells))
    printer.console.print(table)
    printer.line("how far rewards and accuracy will rise is not forecast: a few steps do not tell")
    for line in found.advice:
        printer.line(f"recommended: {line}", "yellow")


def _interval(interval: Interval, style: str) -> str:
    """Return "0.41 [0.37, 0.45]"."""
    return f"{interval.value:{style}} [{interval.low:{style}}, {interval.high:{style}}]"


def duration(seconds: float) -> str:
    """Return "5 s", "12 min" or "3.4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _sections(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Group flat keys by the part before the first dot; those without one are "run"."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        section, dot, name = key.partition(".")
        sections.setdefault(section if dot else "run", {})[name if dot else key] = value
    return sections


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _reward_table(found: Check) -> Table:
    table = Table()
    for heading in ("reward", "weight", *KINDS, "ms each", ""):
        table.add_column(heading, justify="left" if heading in ("reward", "") else "right", overflow="fold")
    table.columns[0].min_width = min(30, max(map(len, found.rewards)))
    for name, reward in found.rewards.items():
        cells = [name, f"{reward.weight:g}"]
        cells += ["-" if reward.scores[kind] is None else f"{reward.scores[kind]:.3f}" for kind in KINDS]
        cells += [f"{reward.milliseconds:.3f}", (reward.problem or "fine").partition(":")[0]]
        style = "bold red" if reward.problem else ""
        table.add_row(*(Text(visible(cell), style=style) for cell in cells))
    return table
