"""Check display: what a check found -> the terminal, dead rewards and other problems in red."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo.display import visible

if TYPE_CHECKING:
    from grpo.check import Check

_LONGEST = 1500


def show(found: "Check", changed: dict[str, Any]) -> None:
    """Print it, in the order in which a person asks: config, data, prompts, batch, rewards, memory, time, verdict."""
    console = Console(highlight=False, soft_wrap=False)
    say = Say(console)
    say.heading("config")
    say.line(", ".join(f"{key} {value}" for key, value in changed.items()) or "all defaults")
    say.line(f"run directory {found.run_dir}; all keys and values are in its config.yaml once it runs")
    say.heading("data")
    say.line(
        f"{found.rows:,} training rows, {found.held_out:,} held out; an answer in {found.with_answer / found.rows:.1%} of them"
    )
    spread = ", ".join(f"{name} {value}" for name, value in found.lengths.items())
    say.line(f"prompt tokens: {spread}; {found.too_long} left out as too long")
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
    parts = ", ".join(f"{name} {value:.3f} GiB" for name, value in found.memory.items())
    say.line(f"{found.parameters / 1e6:,.1f} million parameters; {parts}")
    say.line(
        f"at least {sum(found.memory.values()):.2f} GiB per process, and activations for the tokens of one batch on top"
    )
    say.line(
        f"at least {found.least_seconds_per_step:.3g} s per step, were it all matrix products at the "
        f"{found.matrix_rate / 1e9:,.0f} GFLOP/s measured here; the first step of a run measures it"
    )
    for warning in found.warnings:
        say.line(f"warning: {warning}", "bold red" if warning.startswith("reward '") else "yellow")
    for problem in found.problems:
        say.line(f"problem: {problem}", "bold red")
    if not found.problems:
        say.line("ready to train", "bold green")


def _rewards(found: "Check") -> Table:
    table = Table()
    kinds = ("gold", "wrong", "empty", "hostile")
    for heading in ("reward", "weight", *kinds, "ms each", ""):
        table.add_column(heading, justify="left" if heading in ("reward", "") else "right", overflow="fold")
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
