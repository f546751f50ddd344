"""The dashboard: run directories -> curves, completions, comparison and chat in a browser. The only importer of gradio.

It reads run directories, and writes one file: what people say about answers (grpo/feedback.py). What a model wrote is shown as
text, never as markup. Names that come from the browser are looked up among the runs that were found; nothing is opened by name.
"""

import html
import ipaddress
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grpo.dashboard import curves
from grpo.dashboard.curves import CURVES
from grpo.dashboard.readers import Row, RunFolder, find_runs, groups_of, is_correct, matching
from grpo.display import visible
from grpo.errors import ConfigError, GrpoError
from grpo.feedback import append_feedback, checkpoint_sha, new_feedback

if TYPE_CHECKING:
    import gradio as gr

REFRESH_SECONDS = 2.0
MOST_CARDS = 32
PALETTE = ("#3b7dd8", "#e8833a", "#2a9d6f", "#c94f7c", "#8a63d2", "#c9a227", "#2aa5b8", "#8c8c8c")
STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


@dataclass
class Board:
    """The runs below a folder, read once for everybody who looks at them."""

    root: Path
    feedback: Path
    _runs: dict[str, RunFolder] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def refresh(self) -> list[str]:
        """Look for runs and for new steps. -> names, the newest run first."""
        with self._lock:
            found = {run.name: run for run in find_runs(self.root)}
            self._runs = {name: self._runs.get(name, run) for name, run in found.items()}
            return list(self._runs)

    def chosen(self, names: list[str] | None) -> list[RunFolder]:
        """The runs of these names, with their newest steps; unknown names are left out."""
        with self._lock:
            runs = [self._runs[name] for name in names or [] if name in self._runs]
            for run in runs:
                run.metrics.refresh()
            return runs

    def models(self) -> dict[str, Path]:
        """Saved models that can be talked to: label -> folder."""
        with self._lock:
            runs = list(self._runs.values())
        return {f"{run.name}/final": run.path / "final" for run in runs if (run.path / "final").is_dir()}


def check_exposure(host: str, share: bool, auth: tuple[str, str] | None) -> None:
    """Raises ConfigError for a page that others could open without a password."""
    if auth is not None or (_is_loopback(host) and not share):
        return
    what = "--share" if share else f"--host {host}"
    raise ConfigError(
        f"{what} would let anybody read these runs and talk to their models: set a name and a password first, "
        f"GRPO_DASHBOARD_AUTH=name:password in the environment or in .env; or leave {what.split()[0]} out"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    root: Path,
    feedback: Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    block: bool = True,
) -> tuple["gr.Blocks", str]:
    """Start it. -> (the page, its address); with `block`, only when somebody ends it. Raises ConfigError."""
    check_exposure(host, share, auth)
    if not root.is_dir():
        raise ConfigError(f"--runs {root}: there is no such folder. Give the one that holds your run directories")
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError('the dashboard needs gradio: pip install -e ".[dashboard]"') from error
    page = build(Board(root, feedback))
    try:
        _, address, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=auth,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            ssr_mode=False,
            allowed_paths=[],
            blocked_paths=[str(root.resolve()), str(Path.cwd()), str(feedback.resolve())],
            footer_links=[],
            theme=_theme(gr),
            css=STYLE,
        )
    except OSError as error:
        raise ConfigError(f"--port {port or 7860}: {error}. Choose another one with --port") from error
    address = public or address
    print(f"dashboard of {root}: {address}  (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return page, address


def _theme(gr: Any) -> Any:
    system = ("ui-sans-serif", "system-ui", "sans-serif")
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        radius_size="md",
        font=system,  # fonts of the machine: a page that fetches some would tell others that it was opened
        font_mono=("ui-monospace", "monospace"),
    )


def build(board: Board) -> "gr.Blocks":
    """The page. Every visitor has a state of their own; what is read from disk is shared."""
    import gradio as gr

    with gr.Blocks(title="GRPO runs", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_id="top", equal_height=True):
            gr.Markdown("## GRPO runs", elem_id="name")
            runs = gr.Dropdown([], multiselect=True, label="Runs", scale=4, elem_id="runs", filterable=True)
            smoothing = gr.Slider(0, 0.98, 0, step=0.02, label="Smoothing", scale=1, min_width=180)
        numbers = gr.HTML(elem_id="numbers")
        with gr.Tab("Curves"):
            plots = _curves_tab(gr, runs, board)
        with gr.Tab("Completions"):
            completions = _completions_tab(gr, board)
        with gr.Tab("Compare"):
            compared = [gr.HTML(elem_classes=["table"]), gr.HTML(elem_classes=["table"])]
        with gr.Tab("Chat"):
            _chat_tab(gr, board, page)

        seen = gr.State({})
        timer = gr.Timer(REFRESH_SECONDS)
        outputs = [runs, numbers, *plots, *compared, *completions.live, seen]
        inputs = [runs, smoothing, completions.run, completions.follow, completions.step, seen]

        def show(
            names: list[str] | None, amount: float, run: str | None, follow: bool, step: float, before: dict[str, Any]
        ) -> list[Any]:
            """Everything that has changed since `before`; what has not is left alone, so that nothing flickers."""
            found = board.refresh()
            if not names and not before:
                names = found[:1]
            chosen = board.chosen(names)
            now = {
                "found": found,
                "curves": [(each.name, each.metrics.changes) for each in chosen] + [amount],
                "states": [(each.name, curves.state_of(each)) for each in chosen],
            }
            updates: list[Any] = []
            if now["found"] != before.get("found"):
                updates.append(gr.Dropdown(choices=found, value=[each.name for each in chosen]))
            else:
                updates.append(gr.skip())
            same = now["curves"] == before.get("curves")
            updates.append(_numbers(chosen) if not same or now["states"] != before.get("states") else gr.skip())
            updates += [gr.skip()] * len(plots) if same else [_plot(gr, curve, chosen, amount) for curve in CURVES]
            updates += [gr.skip()] * 2 if same else [_table(*curves.comparison(chosen)), _config_table(chosen)]
            newer, now["completions"] = completions.newer(found, run, follow, step, before.get("completions", {}))
            return [*updates, *newer, now]

        options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        page.load(show, inputs, outputs, **options)
        timer.tick(show, inputs, outputs, trigger_mode="once", **options)
        for changed in (runs.input, smoothing.release):
            changed(show, inputs, outputs, **options)
    return page


def _curves_tab(gr: Any, runs: Any, board: Board) -> list[Any]:
    plots = []
    for start in range(0, len(CURVES), 3):
        with gr.Row():
            for curve in CURVES[start : start + 3]:
                with gr.Column(min_width=300):
                    title, hint = _inert(curve.title), _inert(curve.hint)
                    gr.HTML(f"<h4>{title}</h4><p>{hint}</p>", elem_classes=["hint"])
                    plots.append(_empty_plot(gr, 210))
    with gr.Accordion("Any other metric", open=False):
        keys = gr.Dropdown([], multiselect=True, label="Metrics", info="Yours, from callbacks, are here too.")
        other = _empty_plot(gr, 300)

        def choices(names: list[str]) -> Any:
            return gr.Dropdown(choices=curves.other_keys(board.chosen(names)))

        def draw(names: list[str], wanted: list[str]) -> Any:
            known = [key for key in curves.other_keys(board.chosen(names)) if key in wanted]
            pattern = "|".join(map(_escaped, known)) or "$."
            return _plot(gr, curves.Curve("", pattern, ""), board.chosen(names), 0.0)

        keys.focus(choices, runs, keys, api_visibility="private")
        keys.input(draw, [runs, keys], other, api_visibility="private")
    return plots


def _empty_plot(gr: Any, height: int) -> Any:
    return gr.LinePlot(
        x="step", y="value", show_label=False, container=False, x_title=" ", y_title=" ", height=height, buttons=[]
    )


def _escaped(key: str) -> str:
    import re

    return re.escape(key)


def _plot(gr: Any, curve: curves.Curve, runs: list[RunFolder], smoothing: float) -> Any:
    import pandas as pd

    points = curves.points_of(curve, runs, smoothing)
    names = list(dict.fromkeys(points["series"]))
    colors = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}
    alone = len(names) < 2
    return gr.LinePlot(
        value=pd.DataFrame(points) if names else None,
        color="series",
        color_map=colors or None,
        colors_in_legend=[] if alone else names,
        color_title=" ",
    )


def _numbers(runs: list[RunFolder]) -> str:
    """The row of big numbers: about the first of the runs."""
    if not runs or not runs[0].metrics.steps:
        return "<p class='empty'>No step yet. Choose a run above, or start one: accelerate launch launch/train.py</p>"
    run = runs[0]
    state = curves.state_of(run)
    total = run.config().get("steps")
    cells = [(state, f"{run.metrics.steps[-1]}" + (f" / {total}" if total else ""), "steps", state)]
    accuracy = run.metrics.arrays("eval/accuracy")[1]
    if len(accuracy):
        cells.append(("held-out accuracy", f"{accuracy[-1]:.1%}", f"{accuracy[0]:.1%} before", ""))
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
    return "".join(
        f"<div class='number {kind}'><span>{_inert(title)}</span><b>{_inert(value)}</b><i>{_inert(note)}</i></div>"
        for title, value, note, kind in cells
    )


def _table(headings: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{_inert(cell)}</th>" for cell in headings)
    body = "".join("<tr>" + "".join(f"<td>{_inert(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _config_table(runs: list[RunFolder]) -> str:
    if len(runs) < 2:
        return "<p class='empty'>Choose two runs or more above: what their configs do not share stands here.</p>"
    return "<h3>Where their configs differ</h3>" + _table(*curves.differences(runs))


def _inert(text: object) -> str:
    """Text inside HTML that stays text."""
    return html.escape(visible(str(text)))


@dataclass
class _Completions:
    run: Any
    follow: Any
    step: Any
    live: list[Any]
    newer: Any


def _completions_tab(gr: Any, board: Board) -> _Completions:
    with gr.Row():
        run = gr.Dropdown([], label="Run", scale=2, elem_id="completions-run")
        step = gr.Slider(0, 1, 1, step=1, label="Step", scale=3, elem_id="step")
        follow = gr.Checkbox(True, label="Follow the newest step", scale=1, min_width=140, elem_id="follow")
    with gr.Row():
        judged = gr.Radio(["all", "right", "wrong"], value="all", label="Answer", scale=2)
        lowest = gr.Textbox(label="Reward from", scale=1, min_width=90, elem_id="lowest")
        highest = gr.Textbox(label="to", scale=1, min_width=90)
        text = gr.Textbox(label="Text", placeholder="in the prompt or the completion", scale=3, elem_id="search")
    table = gr.Dataframe(
        headers=["prompt", "completion", "reward", "advantage", "right", "tokens"],
        datatype="str",
        interactive=False,
        max_chars=160,
        column_widths=["30%", "38%", "8%", "9%", "7%", "8%"],
        max_height=340,
        elem_id="completions",
        label="Completions of this step: click one for its whole group",
        show_label=True,
        buttons=[],
    )
    shown = gr.State([])
    group = gr.State([])

    def rows_for(name: str | None, at: float, judged: str, low: str, high: str, text: str) -> list[Row]:
        found = board.chosen([name] if name else [])
        if not found:
            return []
        wanted = {"right": True, "wrong": False}.get(judged)
        rows = found[0].rows_of_step(int(at))
        return matching(rows, text=text or "", correct=wanted, lowest=_parsed(low), highest=_parsed(high))

    def fill(
        name: str | None, at: float, judged: str, low: str, high: str, text: str
    ) -> tuple[Any, list[tuple[int, int]]]:
        rows = rows_for(name, at, judged, low, high, text)
        return {"headers": table.headers, "data": [_cells(row) for row in rows]}, [_key(row) for row in rows]

    def open_group(name: str | None, at: float, keys: list[Any], event: Any) -> list[Row]:
        found = board.chosen([name] if name else [])
        index = event.index[0]
        if not found or not 0 <= index < len(keys):
            return []
        return groups_of(found[0].rows_of_step(int(at))).get(keys[index][0], [])

    open_group.__annotations__["event"] = gr.SelectData  # gradio finds out from it what to hand over

    def newer(
        found: list[str], name: str | None, following: bool, at: float, before: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Updates of run and step: the newest run at first, the newest step while it is followed."""
        current = name if name in found else (found[0] if found else None)
        runs = board.chosen([current] if current else [])
        last = (runs[0].last_rollout_step() if runs else None) or 1
        wanted = last if following else min(int(at), last)
        now = {"runs": found, "last": last}
        same_runs = current == name and found == before.get("runs")
        same_step = wanted == at and last == before.get("last")
        return [
            gr.skip() if same_runs else gr.Dropdown(choices=found, value=current),
            gr.skip() if same_step else gr.Slider(maximum=max(2, last), value=wanted),
        ], now

    filters = [run, step, judged, lowest, highest, text]
    options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    for changed in (run.change, step.change, judged.change, lowest.change, highest.change, text.change):
        changed(fill, filters, [table, shown], **options)
    step.input(lambda: False, None, follow, **options)
    table.select(open_group, [run, step, shown], group, **options)

    @gr.render(inputs=[run, group], show_progress="hidden")
    def cards(name: str | None, rows: list[Row]) -> None:
        if not rows:
            gr.Markdown("Click a completion: its group stands here, side by side, with what each was paid and taught.")
            return
        gold = (rows[0].get("columns") or {}).get("answer")
        with gr.Row(equal_height=True):
            gr.Textbox(visible(str(rows[0].get("prompt", ""))), label="Prompt", lines=2, max_lines=8, scale=4)
            gr.Textbox(visible("" if gold is None else str(gold)), label="Gold answer", lines=2, max_lines=8, scale=1)
        with gr.Row(elem_classes=["cards"]):
            for row in rows[:MOST_CARDS]:
                gr.Textbox(
                    visible(str(row.get("completion", ""))),
                    label=_title(row),
                    lines=6,
                    max_lines=14,
                    min_width=260,
                    elem_classes=["card", {True: "right", False: "wrong", None: ""}[is_correct(row)]],
                )
        pick = gr.Radio(
            [(f"{row.get('sample')}: {float(row.get('reward') or 0):.3f}", index) for index, row in enumerate(rows)],
            value=0,
            label="What do you say about completion",
        )

        def about(index: int) -> dict[str, Any]:
            row = rows[index if isinstance(index, int) and 0 <= index < len(rows) else 0]
            pair_id = (row.get("columns") or {}).get("pair_id")
            found = board.chosen([name] if name else [])
            return {
                "prompt": str(row.get("prompt", "")),
                "completion": str(row.get("completion", "")),
                "pair_id": pair_id if isinstance(pair_id, str | int) else None,
                "model_id": f"{found[0].path} step {row.get('step')}" if found else "",
            }

        _feedback_form(gr, board, [pick], about)

    return _Completions(run, follow, step, [run, step], newer)


def _parsed(text: str | None) -> float | None:
    """What was typed, as a number; None = no condition."""
    try:
        return float(text or "")
    except ValueError:
        return None


def _cells(row: Row) -> list[str]:
    right = is_correct(row)
    return [
        visible(str(row.get("prompt", ""))),
        visible(str(row.get("completion", ""))),
        _number(row.get("reward"), ".3f"),
        _number(row.get("advantage"), "+.3f"),
        "" if right is None else ("yes" if right else "no"),
        str(row.get("length", "")),
    ]


def _key(row: Row) -> tuple[int, int]:
    return int(row.get("draw", 0)), int(row.get("sample", 0))


def _number(value: Any, style: str) -> str:
    return format(float(value), style) if isinstance(value, (int, float)) else ""


def _title(row: Row) -> str:
    parts = [f"#{row.get('sample')}", f"reward {_number(row.get('reward'), '.3f')}"]
    parts.append(f"advantage {_number(row.get('advantage'), '+.3f')}")
    rewards = row.get("rewards") or {}
    parts += [f"{name.rpartition(':')[2]} {_number(value, 'g') or '-'}" for name, value in rewards.items()]
    parts.append(f"{row.get('length')} tokens" + ("" if row.get("ended", True) else ", cut off"))
    return visible(" · ".join(parts))


def _feedback_form(gr: Any, board: Board, inputs: list[Any], about: Any) -> None:
    """Thumbs and a correction -> one line of the feedback file. `about(*inputs)` says which answer it is about."""
    with gr.Row(elem_classes=["feedback"]):
        correction = gr.Textbox(label="What it should have said", lines=1, scale=3)
        note = gr.Textbox(label="Note", lines=1, scale=2)
        reviewer = gr.Textbox(label="Your pseudonym", lines=1, scale=1, min_width=120)
        consent = gr.Checkbox(False, label="May be used to train", scale=1, min_width=140)
    with gr.Row(elem_classes=["feedback"]):
        good = gr.Button("✓ right", size="sm")
        bad = gr.Button("✗ wrong", size="sm")
        better = gr.Button("✎ correct it", size="sm", variant="primary")
    told = gr.Markdown(elem_classes=["told"])

    def writer(verdict: Literal["accept", "reject", "correct"]) -> Any:
        def write(correction: str, note: str, reviewer: str, consent: bool, *given: Any) -> str:
            try:
                fields = about(*given)
                extra = {"correction": correction} if verdict == "correct" else {}
                record = new_feedback(verdict, note=note, reviewer=reviewer, consent=consent, **extra, **fields)
                append_feedback(board.feedback, record)
            except GrpoError as error:
                return f"Not written: {_plain_markdown(str(error))}"
            return f"Written to {_plain_markdown(board.feedback.name)}. Thank you." + (
                "" if consent else " Without your consent it is kept, and never used to train."
            )

        return write

    for button, verdict in ((good, "accept"), (bad, "reject"), (better, "correct")):
        button.click(
            writer(verdict),  # type: ignore[arg-type]
            [correction, note, reviewer, consent, *inputs],
            told,
            api_visibility="private",
            show_progress="hidden",
        )


def _plain_markdown(text: str) -> str:
    return "`" + visible(text).replace("`", "'").replace("\n", " ")[:300] + "`"


class _Speakers:
    """The models in memory: the last that were asked."""

    def __init__(self) -> None:
        self._key: tuple[str, str | None] | None = None
        self._loaded: Any = None

    def get(self, model: str, base: str | None) -> Any:
        from grpo.chat import speakers

        if self._key != (model, base):
            self._key, self._loaded = None, None  # one pair at a time: free the old before the new is loaded
            self._loaded = speakers(model, base)
            self._key = (model, base)
        return self._loaded


def _chat_tab(gr: Any, board: Board, page: Any) -> None:
    loaded = _Speakers()
    with gr.Row():
        model = gr.Dropdown([], label="Model", scale=3, elem_id="model")
        beside = gr.Checkbox(True, label="Beside its base", scale=1, min_width=140)
        temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0 = greedy)", scale=2)
        longest = gr.Slider(16, 2048, 256, step=16, label="At most so many tokens", scale=2)
    question = gr.Textbox(
        label="Your question", placeholder="Asked as in training: with that run's system prompt", elem_id="question"
    )
    ask = gr.Button("Ask", variant="primary", elem_id="ask")
    with gr.Row(equal_height=True):
        base_answer = gr.Textbox(label="Base", lines=8, max_lines=24, elem_id="base-answer")
        trained_answer = gr.Textbox(label="Trained", lines=8, max_lines=24, elem_id="trained-answer")
    trouble = gr.Markdown()
    asked = gr.State({})
    gr.Markdown("What do you say about the trained model's answer?")

    def reply(
        name: str | None, with_base: bool, temperature: float, longest: float, question: str
    ) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
        folder = board.models().get(name or "")
        if folder is None or not question.strip():
            yield "", "", "Choose a model, and ask something.", {}
            return
        base = RunFolder(folder.parent).base_model() if with_base else None
        fields = {"prompt": question, "model_id": str(folder)}
        try:
            from grpo.chat import answers

            yield "", "", "Loading...", {}
            pair = loaded.get(str(folder), base)
            for so_far in answers(pair, question, longest=int(longest), temperature=float(temperature)):
                trained = visible(so_far["trained"])
                yield visible(so_far.get("base", "")), trained, "", fields | {"completion": so_far["trained"]}
        except GrpoError as error:
            yield "", "", _plain_markdown(str(error)), {}

    def models() -> Any:
        board.refresh()
        found = list(board.models())
        return gr.Dropdown(choices=found, value=found[0] if found else None)

    for event in (ask.click, question.submit):
        event(
            reply,
            [model, beside, temperature, longest, question],
            [base_answer, trained_answer, trouble, asked],
            concurrency_limit=1,
            concurrency_id="chat",
            api_visibility="private",
            show_progress="hidden",
        )

    def about(fields: dict[str, Any]) -> dict[str, Any]:
        if not fields:
            raise ConfigError("ask something first")
        return fields | {"checkpoint_sha": checkpoint_sha(fields["model_id"])}

    _feedback_form(gr, board, [asked], about)
    page.load(models, None, model, api_visibility="private", show_progress="hidden")
