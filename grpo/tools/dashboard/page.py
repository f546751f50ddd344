"""The dashboard's page: runs, numbers, findings, and tabs with curves, completions, comparison and chat.

The tabs in other files (completions_tab.py, chat_tab.py) receive the module gradio as an argument.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.tools.dashboard.board import Board
from grpo.tools.dashboard.chat_tab import chat_tab
from grpo.tools.dashboard.completions_tab import completions_tab
from grpo.tracking import curves
from grpo.tracking.curves import CURVES
from grpo.tracking.drawing import dot, plot
from grpo.tracking.markup import inert, table
from grpo.tracking.metrics import interval_of
from grpo.tracking.run_reader import RunFolder

if TYPE_CHECKING:
    import gradio as gr

REFRESH_SECONDS = 2.0
HOVER = (Path(__file__).parent / "curves.js").read_text(encoding="utf-8")


def build(board: Board) -> "gr.Blocks":
    """Build the page. Each visitor has a state of their own; data read from disk is shared."""
    import gradio as gr

    with gr.Blocks(title="GRPO runs", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_id="top", equal_height=True):
            gr.Markdown("## GRPO runs", elem_id="name")
            runs = gr.Dropdown([], multiselect=True, label="Runs", scale=4, elem_id="runs", filterable=True)
            smoothing = gr.Slider(0, 0.98, 0, step=0.02, label="Smoothing", scale=1, min_width=220)
        numbers = gr.HTML(elem_id="numbers")
        findings = gr.HTML(elem_id="findings")
        with gr.Tab("Curves"):
            plots = _curves_tab(gr, runs, board)
        with gr.Tab("Completions"):
            completions = completions_tab(gr, board)
        with gr.Tab("Compare"):
            compared = [gr.HTML(elem_classes=["table"]), gr.HTML(elem_classes=["table"])]
        with gr.Tab("Chat") as tab:
            chat_tab(gr, board, tab, page)

        seen = gr.State({})
        timer = gr.Timer(REFRESH_SECONDS)
        outputs = [runs, numbers, findings, plots, *compared, seen, *completions.outputs]
        inputs = [runs, smoothing, seen, *completions.inputs]

        def show(names: list[str] | None, amount: float, before: dict[str, Any], *given: Any) -> list[Any]:
            """Return updates of the outputs that changed since `before`. Others are skipped and do not flicker."""
            found = board.refresh()
            if not names and not before.get("found"):  # the first refresh with a run
                names = found[:1]
            chosen = board.chosen(names)
            now = {
                "found": found,
                "curves": [(each.name, each.metrics.changes) for each in chosen] + [amount],
                "states": [(each.name, curves.state_of(each)) for each in chosen],
                "findings": _findings(chosen),
            }
            updates: list[Any] = []
            if now["found"] != before.get("found"):
                updates.append(gr.Dropdown(choices=found, value=[each.name for each in chosen]))
            else:
                updates.append(gr.skip())
            same = now["curves"] == before.get("curves")
            updates.append(_numbers(chosen) if not same or now["states"] != before.get("states") else gr.skip())
            updates.append(now["findings"] if now["findings"] != before.get("findings") else gr.skip())
            updates.append(gr.skip() if same else _plots(CURVES, chosen, amount))
            updates += [gr.skip()] * 2 if same else [table(*curves.comparison(chosen)), _config_table(chosen)]
            newer, now["completions"] = completions.refresh(gr, found, before.get("completions", {}), *given)
            return [*updates, now, *newer]

        options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        page.load(show, inputs, outputs, **options)
        timer.tick(show, inputs, outputs, trigger_mode="once", **options)
        for changed in (runs.input, smoothing.release):
            changed(show, inputs, outputs, **options)
    return page


def _curves_tab(gr: Any, runs: Any, board: Board) -> Any:
    plots = gr.HTML(elem_id="curves", elem_classes=["curves"], js_on_load=HOVER)
    with gr.Accordion("Any other metric", open=False):
        keys = gr.Dropdown([], multiselect=True, label="Metrics", info="Including those of your callbacks.")
        other = gr.HTML(elem_classes=["curves"], js_on_load=HOVER)

        def choices(names: list[str]) -> Any:
            return gr.Dropdown(choices=curves.other_keys(board.chosen(names)))

        def draw(names: list[str], wanted: list[str]) -> str:
            known = [key for key in curves.other_keys(board.chosen(names)) if key in wanted]
            shown = [curves.Curve(key, re.escape(key), "") for key in known]
            return _plots(shown, board.chosen(names), 0.0)

        keys.focus(choices, runs, keys, api_visibility="private")
        keys.input(draw, [runs, keys], other, api_visibility="private")
    return plots


def _plots(shown: Sequence[curves.Curve], runs: list[RunFolder], smoothing: float) -> str:
    return "".join(plot(curve.title, curve.hint, curves.lines_of(curve, runs, smoothing)) for curve in shown)


def _numbers(runs: list[RunFolder]) -> str:
    """Return the row of large numbers, which is about the first run."""
    if not runs or not runs[0].metrics.steps:
        return "<p class='empty'>No step yet. Choose a run above, or start one: accelerate launch launch/train.py</p>"
    run = runs[0]
    state = curves.state_of(run)
    total = run.config().get("steps")
    cells = [(state, f"{run.metrics.steps[-1]}", f"of {total} steps" if total else "steps", state)]
    cells += _main_number(run)
    for title, key, style in (
        ("reward", "reward/mean", ".3f"),
        ("KL", "policy/kl", ".4f"),
        ("length", "rollout/length_mean", ".0f"),
        ("tokens/s", "rollout/tokens_per_second", ".0f"),
        ("memory, GiB", "memory/peak_gib", ".2f"),
    ):
        values = run.metrics.arrays(key)[1]
        if len(values):
            cells.append((title, format(values[-1], style), f"{format(values[0], style)} at first", ""))
    left = curves.seconds_left(run)
    if left is not None and state == "training":
        minutes, seconds = divmod(round(left), 60)
        cells.append(("time left", f"{minutes // 60}:{minutes % 60:02}:{seconds:02}", "at the last 20 steps' pace", ""))
    names = _run_names(runs) if len(runs) > 1 else ""
    return names + "".join(
        f"<div class='number {kind}'><span>{inert(title)}</span><b>{inert(value)}</b><i>{inert(note)}</i></div>"
        for title, value, note, kind in cells
    )


def _run_names(runs: list[RunFolder]) -> str:
    """Return the names of several runs in their colors, and whose numbers follow."""
    colors = curves.colors_of(runs)
    names = "".join(f"<span>{dot(colors[run.name])}{inert(run.name)}</span>" for run in runs)
    return f"<p class='runs'>{names}<i>The numbers are those of {inert(runs[0].name)}.</i></p>"


def _main_number(run: RunFolder) -> list[tuple[str, str, str, str]]:
    """Return the cell of the held-out accuracy with its interval, or of the main reward on held-out prompts."""
    key = curves.main_key(run)
    if key is None:
        return []
    values = run.metrics.arrays(key)[1]
    at_the_end = {each: run.metrics.last(each) for each in run.metrics.columns if each.startswith("eval/")}
    between = interval_of({each: value for each, value in at_the_end.items() if value is not None}, key)
    share = key == "eval/accuracy"
    style = ".1%" if share else ".3f"
    note = "" if between is None else f", 95 %: {format(between[0], style)} to {format(between[1], style)}"
    title = "held-out accuracy" if share else f"held-out {curves.short_name(key.removeprefix('eval/'))}"
    return [(title, format(values[-1], style), f"{format(values[0], style)} before{note}", "")]


def _findings(runs: list[RunFolder]) -> str:
    """Return the findings of the runs' diagnostics (findings.jsonl) with their fixes."""
    items = [
        f"<li><b>{inert(row['text'])}</b> <i>{inert(run.name)}, step {inert(row['step'])}</i>"
        f"<br>{inert(row['mend'])}</li>"
        for run in runs
        for row in run.findings()
    ]
    return f"<h4>What may keep it from learning</h4><ul>{''.join(items)}</ul>" if items else ""


def _config_table(runs: list[RunFolder]) -> str:
    if len(runs) < 2:
        return "<p class='empty'>Choose two runs or more above: their configs are compared here.</p>"
    return "<h3>Where their configs differ</h3>" + table(*curves.differences(runs))
