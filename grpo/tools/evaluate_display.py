"""Print an evaluation in the terminal: sentences with the result, and a table of all metrics."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.runtime.messages import visible
from grpo.tracking.metrics import is_interval, with_interval


def show(report: dict[str, Any]) -> None:
    """Print the report of `compare_models`."""
    console = Console(highlight=False)
    if not console.is_terminal:  # rich assumes 80 columns for a pipe or a file
        console.width = max(console.width, 120)
    for sentence in sentences(report):
        console.print(Text(visible(sentence)), soft_wrap=True)
    console.print(_table(report))


def sentences(report: dict[str, Any]) -> list[str]:
    """Return the result in words.

    # m answers 3 of 4 held-out questions right: 75.0 % (95 % interval 30.1 to 95.4 %).
    # Base b: 25.0 %. Of the same questions, 2 gained and 0 lost: McNemar's exact test p = 0.5, no change.
    """
    model, count, metrics = report["model"], report["items"], report["metrics"]
    if "eval/accuracy" not in metrics:
        return [
            f"{model} answered {count} held-out questions. No row has a gold answer, so right and wrong are unknown."
        ]
    low, high = report["interval95"]["accuracy"]
    judged = report["judged"]
    right = round(metrics["eval/accuracy"] * judged)
    found = [
        f"{model} answers {right} of {judged} held-out questions right: {metrics['eval/accuracy']:.1%} (95 % interval "
        f"{low:.1%} to {high:.1%}), greedy decoding."
    ]
    change = report.get("change", {}).get("accuracy")
    if change is not None:
        p = change["mcnemar_p"]
        gained, lost = change["only_trained_right"], change["only_base_right"]
        verdict = "no change" if p >= 0.05 else "a gain" if gained > lost else "a loss"
        found.append(
            f"Base {report['base']['model']}: {report['base']['metrics']['eval/accuracy']:.1%}. Of the same questions, "
            f"{gained} gained and {lost} lost: McNemar's exact test p = {p:.2g}, {verdict}."
        )
    if report["dropped"]:
        found.append(f"{report['dropped']} questions were left out: longer than data.max_prompt_length.")
    return found


def _table(report: dict[str, Any]) -> Table:
    base = report.get("base")
    keys = [key for key in report["metrics"] if not is_interval(key)]
    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False, caption="[95 % interval]")
    table.add_column("held out")
    for heading in (["base"] if base else []) + ["model"] + (["change"] if base else []):
        table.add_column(heading, justify="right")
    for key in keys:
        after, before = report["metrics"][key], base["metrics"].get(key) if base else None
        cells = [key.removeprefix("eval/"), *([_cell(base, key)] if base else []), _cell(report, key)]
        if base:
            cells.append("" if before is None else f"{after - before:+.3f}")
        table.add_row(*(Text(visible(cell)) for cell in cells))
    return table


def _cell(part: dict[str, Any], key: str) -> str:
    flexible = part["interval95"].get("flexible")
    known = {} if flexible is None else dict(zip(("low", "high"), flexible, strict=True))
    return with_interval(part["metrics"] | {f"eval/accuracy_flexible_{end}": at for end, at in known.items()}, key)
