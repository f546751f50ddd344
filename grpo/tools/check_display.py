"""Check display: what a check found -> the terminal, dead rewards and other problems in red."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo.runtime.messages import visible

if TYPE_CHECKING:
    from grpo.tools.check import Check

_LONGEST = 1500
_SHOWN_ROWS = 3


def show(found: "Check", changed: dict[str, Any]) -> None:
    """Print it, in the order in which a person asks: config, data, prompts, batch, rewards, memory, time, verdict."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a pipe or a file has no width of its own, and 80 cuts the table off
    say = Say(console)
    say.heading("config")
    say.line(
        "changed: " + (", ".join(f"{key} {_value(value)}" for key, value in changed.items()) or "nothing, all defaults")
    )
    for section, values in _sections(found.config).items():
        say.line(f"{section}: " + ", ".join(f"{key} {_value(value)}" for key, value in values.items()), "dim")
    say.line(f"run directory {found.run_dir}")
    say.heading("data")
    say.line(found.data.removeprefix("data: "))
    for row in found.rejected[:_SHOWN_ROWS]:
        say.line(f"left out: {row['place']}: {row['reason']}", "yellow")
    say.line(f"{found.held_out:,} rows held out")
    spread = ", ".join(f"{name} {value}" for name, value in found.lengths.items())
    measured = "" if found.measured == found.rows else f" (of {found.measured:,} rows at even distances)"
    say.line(f"prompt tokens{measured}: {spread}; {found.too_long} left out as too long")
    say.line(f"{found.duplicates} repeated questions, {found.overlap} held-out questions among the training rows")
    for number, prompt in enumerate(found.prompts, start=1):
        text = prompt.text if len(prompt.text) <= _LONGEST else prompt.text[:_LONGEST] + "..."
        answer = "none" if prompt.answer is None else prompt.answer
        title = f"prompt {number}: {prompt.tokens} tokens, gold answer {answer}"
        console.print(Panel(Text(visible(text)), title=Text(visible(title)), title_align="left"))
    say.heading("batch")
    say.line(found.batch)
    say.heading("rewards")
    console.print(_rewards(found))
    if found.form:
        say.line(f"gold and wrong answers are written in the form that these rewards pay best: {found.form}")
    say.heading("memory and time")
    parts = ", ".join(f"{name} {value:.3f} GiB" for name, value in found.memory.items() if name != "peak")
    say.line(f"{found.parameters / 1e6:,.1f} million parameters; {parts}")
    say.line(
        f"{found.memory['peak']:.2f} GiB per process at the most, beside the program itself (on a GPU: the CUDA context)"
    )
    say.line(
        f"at least {found.least_seconds_per_step:.3g} s per step, {duration(found.least_seconds_per_step * found.steps)} for "
        f"{found.steps:,} steps, were it all matrix products at the {found.matrix_rate / 1e9:,.0f} GFLOP/s measured here; "
        f"the first step of a run measures it"
    )
    for warning in found.warnings:
        say.line(f"warning: {warning}", "bold red" if warning.startswith("reward '") else "yellow")
    for problem in found.problems:
        say.line(f"problem: {problem}", "bold red")
    if not found.problems:
        say.line("ready to train", "bold green")


def duration(seconds: float) -> str:
    """5 s, 12 min, 3.4 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _sections(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Flat keys by the part before the first dot; those without one are "run"."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        section, dot, name = key.partition(".")
        sections.setdefault(section if dot else "run", {})[name if dot else key] = value
    return sections


def _value(value: Any) -> str:
    """As a YAML file would say it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _rewards(found: "Check") -> Table:
    table = Table()
    kinds = ("gold", "wrong", "empty", "hostile")
    for heading in ("reward", "weight", *kinds, "ms each", ""):
        table.add_column(heading, justify="left" if heading in ("reward", "") else "right", overflow="fold")
    table.columns[0].min_width = min(30, max(map(len, found.rewards)))
    for name, reward in found.rewards.items():
        cells = [name, f"{reward.weight:g}"]
        cells += ["-" if reward.scores[kind] is None else f"{reward.scores[kind]:.3f}" for kind in kinds]
        cells += [f"{reward.milliseconds:.3f}", (reward.problem or "fine").partition(":")[0]]
        style = "bold red" if reward.problem else ""
        table.add_row(*(Text(visible(cell), style=style) for cell in cells))
    return table


class Say:
    """Lines and headings, never markup."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def heading(self, text: str) -> None:
        self.console.print(Text(text, style="bold"))

    def line(self, text: str, style: str = "") -> None:
        self.console.print(Text("  " + visible(text), style=style), soft_wrap=True)
