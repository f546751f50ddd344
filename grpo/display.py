"""Display: metrics and completions -> what a person sees in the terminal; a display that breaks never stops training.

On a terminal: a progress bar. In a log file: a plain line now and then. On every process but the first: nothing.
"""

import contextlib
import os
import time
import unicodedata
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

_SECONDS_BETWEEN_LINES = 5.0
_COMPLETIONS = 3
_LONGEST = 800
"""Characters shown of a prompt or completion: a model that rambles must not flood the terminal."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would end the program with SystemExit here; `train | head` must go on training


class Display:
    """Shows a run that does `total_steps` steps and begins (or goes on) after `start` of them."""

    def __init__(self, total_steps: int, start: int = 0, enabled: bool = True) -> None:
        self.enabled = enabled
        self._total, self._start = total_steps, start
        self._began = time.monotonic()
        self._last_line: float | None = None
        self._accuracy: float | None = None
        self._console = _Console(highlight=False)
        self._progress: Progress | None = None

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Show that `step` steps are done (1 after the first), and their last metrics."""
        accuracy = metrics.get("eval/accuracy")
        self._accuracy = self._accuracy if accuracy is None else accuracy
        self._guarded(lambda: self._show_step(step, self._summary(step, metrics)))

    def completions(self, rows: list[dict[str, Any]]) -> None:
        """Show up to 3 rows of rollouts.jsonl ("prompt", "completion", "reward")."""
        self._guarded(lambda: self._console.print(*(self._panel(row) for row in rows[:_COMPLETIONS])))

    def say(self, text: str) -> None:
        """Show a message."""
        self._guarded(lambda: self._console.print(self._text(text), soft_wrap=True))

    def table(self, before: dict[str, float] | None, after: dict[str, float] | None, run_dir: Any) -> None:
        """Show the held-out evaluation before and after training, and where everything is written."""
        self.close()
        self._guarded(lambda: self._show_table(before or {}, after or {}))
        self.say(f"Everything about this run is in {run_dir}")

    def close(self) -> None:
        """Give the terminal back (the bar hides the cursor). A second call does nothing."""
        progress, self._progress = self._progress, None
        if progress is not None:
            self._guarded(progress.stop)

    def _summary(self, step: int, metrics: dict[str, Any]) -> str:
        """reward 0.42, accuracy 0.31, length 118, 512 tokens/s, 0:03:12 left"""
        parts = []
        for name, value, style in [
            ("reward", metrics.get("reward/mean"), ".3f"),
            ("accuracy", self._accuracy, ".3f"),
            ("length", metrics.get("rollout/length_mean"), ".0f"),
        ]:
            if value is not None:
                parts.append(f"{name} {value:{style}}")
        speed = metrics.get("rollout/tokens_per_second")
        if speed is not None:
            parts.append(f"{speed:.0f} tokens/s")
        if step > self._start:
            left = (time.monotonic() - self._began) / (step - self._start) * (self._total - step)
            minutes, seconds = divmod(round(left), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        return ", ".join(parts)

    def _show_step(self, step: int, summary: str) -> None:
        if self._console.is_terminal:
            if self._progress is None:
                columns = (
                    TextColumn("step {task.completed}/{task.total}"),
                    BarColumn(24),
                    TextColumn("{task.description}"),
                )
                # No refresh thread: an error in it could not be caught, and nothing changes between two steps.
                self._progress = Progress(*columns, console=self._console, auto_refresh=False)
                self._progress.add_task("", total=self._total, completed=self._start)
                self._progress.start()
            self._progress.update(self._progress.task_ids[0], completed=step, description=summary, refresh=True)
            return
        now = time.monotonic()
        if self._last_line is None or step >= self._total or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(self._text(f"step {step}/{self._total}: {summary}"), soft_wrap=True)

    def _panel(self, row: dict[str, Any]) -> Panel:
        prompt = row.get("prompt", "")
        if isinstance(prompt, list):  # chat messages: the last one is the question
            prompt = prompt[-1].get("content", "") if prompt else ""
        reward = row.get("reward")
        title = f"step {row.get('step', '?')}" + ("" if reward is None else f", reward {reward:.3f}")
        question, answer = (self._text(_shorten(str(text))) for text in (prompt, row.get("completion", "")))
        question.stylize("dim")
        content = Text.assemble(question, "\n", answer)
        return Panel(content, title=Text(title), title_align="left")

    def _show_table(self, before: dict[str, float], after: dict[str, float]) -> None:
        keys = list(dict.fromkeys([*before, *after]))
        if not keys:
            return
        table = Table()
        for heading in ("held out", "before", "after", "change"):
            table.add_column(heading, justify="left" if heading == "held out" else "right")
        for key in keys:
            old, new = before.get(key), after.get(key)
            change = "" if old is None or new is None else f"{new - old:+.3f}"
            cells = [key, "" if old is None else f"{old:.3f}", "" if new is None else f"{new:.3f}", change]
            table.add_row(*(self._text(cell) for cell in cells))
        self._console.print(table)

    def _text(self, text: str) -> Text:
        """Text that shows exactly its characters: no markup, no control, nothing that cannot be written."""
        encoding = self._console.encoding
        return Text(visible(text).encode(encoding, "backslashreplace").decode(encoding))

    def _guarded(self, action: Callable[[], Any]) -> None:
        if not self.enabled:
            return
        try:
            action()
        except (OSError, ValueError):  # a full disk, `| head`, a closed terminal (ValueError: closed file)
            self.enabled = False
            self._silence()

    def _silence(self) -> None:
        """Point standard output at nothing: what is left in its buffer would fail again when Python exits, with 120."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._console.file.fileno())
            os.close(nowhere)
        if self._progress is not None:
            with contextlib.suppress(OSError, ValueError):
                self._progress.stop()


def visible(text: str) -> str:
    r"""Control, format and bidirectional characters as their code: ESC -> \x1b. Line breaks stay."""
    return "".join(
        character
        if character == "\n" or unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text) - _LONGEST} more characters)"
