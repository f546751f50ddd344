"""Completions tab: filter by step, reward, answer and text; show the group of a completion side by side."""

from dataclasses import dataclass
from typing import Any

from grpo.runtime.messages import visible
from grpo.tools.dashboard.board import Board
from grpo.tools.dashboard.feedback_form import feedback_form
from grpo.tracking.rollout_reader import (
    Judgement,
    Row,
    groups_of,
    is_correct,
    judge,
    matching,
    told_turns,
    whole_completion,
)

MAX_CARDS = 32
MAX_ROWS = 300
"""Rows in the table."""
SCOPES = {"this step": 1, "10 steps": 10, "100 steps": 100, "all steps": None}
"""Label -> number of steps to search, back from the one shown; None: all."""
WIDTHS = {"step": 7, "prompt": 22, "completion": 31, "reward": 10, "advantage": 13, "right": 8, "tokens": 9}
"""The table's columns and their widths in percent."""

Key = tuple[int, int]
"""(step, draw) of a row's group."""


@dataclass(frozen=True)
class CompletionsTab:
    """The widgets that follow a run during training."""

    board: Board
    inputs: list[Any]
    """Follow, the question that was answered last, the open group, and the widgets of the question."""
    outputs: list[Any]
    """Run, step, and what an answer changes: table, sentence, keys of the rows, open group, question."""

    def refresh(self, gr: Any, found: list[str], before: dict[str, Any], *given: Any) -> tuple[list[Any], dict]:
        """Return updates of the outputs, and the state they were made from.

        The run is the newest at first; the step is the newest while it is followed. Step and table come in one update:
        an answer of its own could arrive after a newer one, and stay.

        Args:
            gr: The module gradio.
            found: Names of the runs.
            before: The state of the refresh before.
            given: Values of the inputs.
        """
        following, asked, opened, name, at, *rest = given
        current = name if name in found else (found[0] if found else None)
        runs = self.board.chosen([current] if current else [])
        last = (runs[0].last_rollout_step() if runs else None) or 1
        following = following and at == before.get("at", at)  # not if the slider was moved since
        wanted = last if following else min(int(at), last)
        same_runs = current == name and found == before.get("runs")
        same_step = wanted == at and last == before.get("last")
        question = (current, wanted, *rest)
        return [
            gr.skip() if same_runs else gr.Dropdown(choices=found, value=current),
            gr.skip() if same_step else gr.Slider(maximum=max(2, last), value=wanted),
            *([gr.skip()] * 5 if question == asked else answer(gr, self.board, following, asked, opened, question)),
        ], {"runs": found, "last": last, "at": wanted}


def answer(
    gr: Any, board: Board, following: bool, before: Any, opened: list[Row], question: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Return the table, a sentence about it, the keys of its rows, the open group, and the question.

    A group stays open while newer steps arrive. Another question closes it, unless it is among the answers.

    Args:
        gr: The module gradio.
        board: The runs.
        following: The newest step is followed.
        before: The question before.
        opened: The open group.
        question: Run, step, scope, judgement, lowest and highest reward, text.
    """
    name, at, scope, judged, low, high, text = question
    wanted = {"right": True, "wrong": False}.get(judged)
    conditions = {"text": text or "", "correct": wanted, "lowest": _parsed(low), "highest": _parsed(high)}
    rows, oldest = find(board, name, int(at), SCOPES.get(scope, 1), conditions)
    keys = [_key(row) for row in rows]
    same = bool(before) and (name, *question[2:]) == (before[0], *before[2:])
    stays = not opened or _key(opened[0]) in keys or (following and same)
    return _table(gr, rows), _told(rows, int(at), oldest), keys, gr.skip() if stays else [], question


def completions_tab(gr: Any, board: Board) -> CompletionsTab:
    """Lay the tab out and connect its events."""
    options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Row():
        run = gr.Dropdown([], label="Run", scale=2, elem_id="completions-run")
        step = gr.Slider(0, 1, 1, step=1, label="Step", scale=3, elem_id="step")
        follow = gr.Checkbox(True, label="Follow the newest step", scale=1, min_width=140, elem_id="follow")
    with gr.Row():
        text = gr.Textbox(label="Text", placeholder="in the prompt or the completion", scale=3, elem_id="search")
        scope = gr.Dropdown(list(SCOPES), value="this step", label="Search back over", scale=1, elem_id="scope")
        judged = gr.Radio(["all", "right", "wrong"], value="all", label="Answer", scale=2, elem_id="judged")
        lowest = gr.Textbox(label="Reward from", scale=1, min_width=90, elem_id="lowest")
        highest = gr.Textbox(label="to", scale=1, min_width=90)
    told = gr.Markdown(elem_id="found")
    table = gr.Dataframe(
        headers=list(WIDTHS),
        datatype="str",
        interactive=False,
        max_chars=160,
        max_height=340,
        elem_id="completions",
        show_label=False,
        buttons=[],
    )
    shown, group, asked = gr.State([]), gr.State([]), gr.State(())

    def fill(following: bool, before: Any, opened: list[Row], *question: Any) -> tuple[Any, ...]:
        return answer(gr, board, following, before, opened, question)

    def open_group(name: str | None, keys: list[Key], event: Any) -> list[Row]:
        found = board.chosen([name] if name else [])
        index = event.index[0]
        if not found or not 0 <= index < len(keys):
            return []
        step, draw = keys[index]
        return groups_of(found[0].rows_of_step(step)).get(draw, [])

    open_group.__annotations__["event"] = gr.SelectData  # gradio passes the event by this annotation

    question = [run, step, scope, judged, lowest, highest, text]
    inputs, outputs = [follow, asked, group, *question], [table, told, shown, group, asked]
    # What the user changes is answered at once; what `refresh` changes comes with its answer.
    changes = [widget.input for widget in question]
    gr.on(changes, fill, inputs, outputs, trigger_mode="always_last", **options)
    step.input(lambda: False, None, follow, **options)
    table.select(open_group, [run, shown], group, **options)

    @gr.render(inputs=[run, group], show_progress="hidden")
    def cards(name: str | None, rows: list[Row]) -> None:
        _cards(gr, board, name, rows)

    return CompletionsTab(board, inputs, [run, step, *outputs])


def find(
    board: Board, name: str | None, at: int, back: int | None, conditions: dict[str, Any]
) -> tuple[list[Row], int]:
    """Search completions, newest first.

    Args:
        board: The runs.
        name: The run's name.
        at: The newest step.
        back: Number of steps to search, or None for all.
        conditions: Keyword arguments of `matching`.

    Returns:
        Rows, and the oldest step searched.
    """
    found = board.chosen([name] if name else [])
    if not found:
        return [], at
    oldest = 0 if back is None else max(0, at - back + 1)
    return found[0].search(at, oldest, lambda rows: matching(rows, **conditions), MAX_ROWS)


def _told(rows: list[Row], newest: int, oldest: int) -> str:
    """Return a sentence about the table's contents."""
    where = f"step {newest}" if oldest >= newest else f"steps {oldest} to {newest}"
    if not rows:
        return f"No completion of {where} fits."
    count = f"The newest {len(rows)}" if len(rows) >= MAX_ROWS else str(len(rows))
    many = "completion" if len(rows) == 1 else "completions"
    return f"{count} {many} of {where}. Click one for its whole group."


def _table(gr: Any, rows: list[Row]) -> Any:
    columns = columns_of(rows)
    cells = [[_cell(row, name) for name in columns] for row in rows]
    return gr.Dataframe(
        value={"headers": columns, "data": cells}, column_widths=[f"{WIDTHS[name]}%" for name in columns]
    )


def columns_of(rows: list[Row]) -> list[str]:
    """Return the table's columns, without "right" where no reward of the run judges correctness."""
    judged = not rows or any(is_correct(row) is not None for row in rows)
    return [name for name in WIDTHS if name != "right" or judged]


def _cell(row: Row, column: str) -> str:
    if column == "right":
        return {True: "yes", False: "no", None: ""}[is_correct(row)]
    if column in ("reward", "advantage"):
        return _number(row.get(column), ".3f" if column == "reward" else "+.3f")
    return visible(str(row.get("length" if column == "tokens" else column, "")))


def _cards(gr: Any, board: Board, name: str | None, rows: list[Row]) -> None:
    """Show a group: its prompt, its different completions side by side, and the feedback form."""
    if not rows:
        return
    gold = (rows[0].get("columns") or {}).get("answer")
    parts = alike(rows)
    judged = judge([part[0] for part in parts])
    gr.Markdown(_legend(rows, len(parts), judged), elem_classes=["told", "legend-of-cards"])
    with gr.Row(equal_height=True):
        gr.Textbox(visible(str(rows[0].get("prompt", ""))), label="Prompt", lines=2, max_lines=8, scale=4)
        gr.Textbox(visible("" if gold is None else str(gold)), label="Gold answer", lines=2, max_lines=8, scale=1)
    with gr.Row(elem_classes=["cards"]):
        for part, verdict in list(zip(parts, judged.verdicts, strict=True))[:MAX_CARDS]:
            gr.Textbox(
                visible(whole_completion(part[0])),
                label=_title(part),
                lines=6,
                max_lines=14,
                min_width=260,
                elem_classes=["card", {True: "right", False: "wrong", None: ""}[verdict]],
            )
    pick = gr.Radio(
        [(_numbers_of(part), index) for index, part in enumerate(parts)], value=0, label="Your judgement of completion"
    )

    def about(index: int) -> dict[str, Any]:
        row = parts[index if isinstance(index, int) and 0 <= index < len(parts) else 0][0]
        pair_id = (row.get("columns") or {}).get("pair_id")
        found = board.chosen([name] if name else [])
        return {
            "prompt": str(row.get("prompt", "")),
            "completion": str(row.get("completion", "")),
            "pair_id": pair_id if isinstance(pair_id, str | int) else None,
            "model_id": f"{found[0].path} step {row.get('step')}" if found else "",
        }

    feedback_form(gr, board, [pick], about)


def alike(rows: list[Row]) -> list[list[Row]]:
    """Return the rows of a group in parts with the same completion and reward, in the order of their first samples."""
    parts: dict[Any, list[Row]] = {}
    for row in rows:
        parts.setdefault((whole_completion(row), row.get("reward"), row.get("ended")), []).append(row)
    return list(parts.values())


def _legend(rows: list[Row], different: int, judged: Judgement) -> str:
    """Return what the cards show: "Step 12: 16 completions, 3 different. Green: right. Red: wrong."."""
    told = f"Step {int(rows[0].get('step', 0))}: {len(rows)} completions, {different} different."
    if different > MAX_CARDS:
        told += f" The first {MAX_CARDS} are shown."
    if any(verdict is not None for verdict in judged.verdicts):
        told += f" Green: {judged.labels[0]}. Red: {judged.labels[1]}."
    return told


def _parsed(text: str | None) -> float | None:
    """Return typed text as a number, or None for no condition."""
    try:
        return float(text or "")
    except ValueError:
        return None


def _key(row: Row) -> Key:
    return int(row.get("step", 0)), int(row.get("draw", 0))


def _number(value: Any, style: str) -> str:
    return format(float(value), style) if isinstance(value, (int, float)) else ""


def _numbers_of(part: list[Row]) -> str:
    """Return "#3" or "#0 and 11 like it"."""
    more = f" and {len(part) - 1} like it" if len(part) > 1 else ""
    return f"#{part[0].get('sample')}{more}"


def _title(part: list[Row]) -> str:
    row = part[0]
    parts = [_numbers_of(part), f"reward {_number(row.get('reward'), '.3f')}"]
    parts.append(f"advantage {_number(row.get('advantage'), '+.3f')}")
    rewards = row.get("rewards") or {}
    parts += [f"{name.rpartition(':')[2]} {_number(value, 'g') or '-'}" for name, value in rewards.items()]
    parts.append(f"{row.get('length')} tokens" + ("" if row.get("ended", True) else ", cut off"))
    parts += [turns] if (turns := told_turns(row)) else []
    return visible(" · ".join(parts))
