"""Console: messages, metrics and completions on the terminal. A terminal that breaks never stops training.

On a terminal, four live lines below the messages; in a log file, one plain line every few seconds. Other processes
than the first show only their warnings.
"""

import atexit
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo.runtime.command import flush_at_exit, redirect_to_devnull
from grpo.runtime.messages import MessageHandler, attach, visible
from grpo.tracking.metrics import METRICS, is_interval, with_interval

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0
_SPEEDS = 10
"""Steps in the mean of tokens per second."""
_SPARKS = 40
"""Steps in the sparkline of the reward."""
_REWARD, _ACCURACY = METRICS["reward/mean"], METRICS["eval/accuracy"]
_SECOND_LINE = (
    "rollout/length_mean",
    "policy/kl",
    "policy/entropy",
    "policy/clip_fraction",
    "rollout/truncated_fraction",
    "reward/zero_std_fraction",
)
_LONGEST = 800
"""Maximum characters shown of a prompt or completion."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would end the program with SystemExit here; `train | head` must go on training


class Terminal:
    """Standard output. It is switched off when it cannot be written (a full disk, `| head`, a closed terminal)."""

    def __init__(self) -> None:
        self.enabled = True
        self._console = _Console(highlight=False)
        self._live: Live | None = None
        atexit.register(flush_at_exit, "stdout")  # other output that cannot be written must not fail the run

    @property
    def is_interactive(self) -> bool:
        """True if lines can be replaced: not in a file, and not on a terminal that cannot move its cursor."""
        return self._console.is_terminal and not self._console.is_dumb_terminal

    @property
    def width(self) -> int:
        return self._console.width

    def print(self, *parts: RenderableType) -> None:
        """Print text, tables, ... above the live view."""
        self._guarded(lambda: self._console.print(*parts, soft_wrap=all(isinstance(part, Text) for part in parts)))

    def show_live(self, view: RenderableType) -> None:
        """Replace the live view at the bottom."""
        self._guarded(lambda: self._update(view))

    def stop_live(self) -> None:
        """End the live view, which hides the cursor. Idempotent."""
        live, self._live = self._live, None
        if live is not None:
            self._guarded(live.stop)

    def text(self, text: str) -> Text:
        """Return a text that is shown literally: no markup, no control characters, only characters of the encoding."""
        encoding = self._console.encoding
        return Text(visible(text).encode(encoding, "backslashreplace").decode(encoding))

    def _update(self, view: RenderableType) -> None:
        if self._live is None:
            # No refresh thread: an error in it could not be caught, and nothing changes between two steps.
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(view, refresh=True)

    def _guarded(self, action: Callable[[], Any]) -> None:
        if not self.enabled:
            return
        try:
            action()
        except (OSError, ValueError):  # ValueError: closed file
            self.enabled = False
            # The rest of its buffer would fail again when Python exits, with exit code 120.
            redirect_to_devnull(self._console.file)
            if self._live is not None:
                with contextlib.suppress(OSError, ValueError):
                    self._live.stop()


class ConsoleHandler(MessageHandler):
    """Messages of the logger `grpo` as lines on the terminal, above the live view."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal

    def write(self, text: str) -> None:
        self._terminal.print(self._terminal.text(text))


def show_messages() -> Terminal:
    """Show the messages of the logger `grpo` on standard output from now on."""
    terminal = Terminal()
    attach(ConsoleHandler(terminal))
    return terminal


class Display:
    """Progress of a run on the terminal, below the messages of the logger `grpo`.

    Args:
        total_steps: steps of the whole run.
        start: steps done before by the resumed run.
        enabled: False on every process but the first, which shows no progress.
    """

    def __init__(self, total_steps: int, start: int = 0, enabled: bool = True) -> None:
        self._shown = enabled
        self._total, self._start = total_steps, start
        self._began = time.monotonic()
        self._last_line: float | None = None
        self._accuracy: tuple[float, int] | None = None
        """The newest held-out accuracy and its step."""
        self._rewards: list[float] = []
        self._speeds: list[float] = []
        self._terminal = show_messages()

    @property
    def enabled(self) -> bool:
        return self._shown and self._terminal.enabled

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Show the number of steps that are done (1 after the first) and the metrics of the last one."""
        accuracy, speed = metrics.get("eval/accuracy"), metrics.get("rollout/tokens_per_second")
        self._accuracy = self._accuracy if accuracy is None else (accuracy, step)
        self._speeds = [*self._speeds, *([] if speed is None else [float(speed)])][-_SPEEDS:]
        if not self.enabled:
            return
        if step == self._start + 1 and "time/step" in metrics:
            seconds = metrics["time/step"]
            left = _about(seconds * (self._total - step))
            log.info("step %d took %.1f s; about %s left (without evaluations)", step, seconds, left)
        if self._terminal.is_interactive:
            self._terminal.show_live(self._view(step, metrics))
        else:
            self._show_line(step, metrics)

    def completions(self, rows: list[dict[str, Any]]) -> None:
        """Show the best and the worst of a step's rows ("prompt", "completion", "reward")."""
        scored = [row for row in rows if row.get("reward") is not None] or rows[:1]
        if not self.enabled or not scored:
            return
        by_reward = sorted(scored, key=lambda row: row.get("reward") or 0.0)
        best, worst = by_reward[-1], by_reward[0]
        if best.get("reward") == worst.get("reward"):
            self._terminal.print(self._panel(best, f"one of {len(scored)} that earn the same"))
        else:
            self._terminal.print(
                *(self._panel(row, f"the {kind} of {len(scored)}") for row, kind in ((best, "best"), (worst, "worst")))
            )

    def table(self, before: dict[str, float] | None, after: dict[str, float] | None, run_dir: Any) -> None:
        """Show the held-out evaluation before and after training, and the run directory."""
        self.close()
        if self.enabled:
            self._show_table(before or {}, after or {})
            log.info("Everything about this run is in %s", run_dir)

    def close(self) -> None:
        """End the live view. Idempotent."""
        self._terminal.stop_live()

    def _summary(self, step: int, metrics: dict[str, Any]) -> str:
        """Return "reward 0.42, held-out accuracy 0.310 (step 10), length 118, 512 tokens/s, 0:03:12 left"."""
        parts = [*_shown(metrics, "reward/mean"), *self._held_out(), *_shown(metrics, "rollout/length_mean")]
        parts += self._speed()
        if step > self._start:
            parts.append(f"{self._left(step)} left")
        return ", ".join(parts)

    def _held_out(self) -> list[str]:
        return [] if self._accuracy is None else [f"{_ACCURACY.show(self._accuracy[0])} (step {self._accuracy[1]})"]

    def _speed(self) -> list[str]:
        return [f"{sum(self._speeds) / len(self._speeds):.0f} tokens/s"] if self._speeds else []

    def _left(self, step: int) -> str:
        """Return the remaining time at the average speed of this run, evaluations included."""
        return _clock((time.monotonic() - self._began) / max(1, step - self._start) * (self._total - step))

    def _show_line(self, step: int, metrics: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._last_line is None or step >= self._total or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._terminal.print(self._terminal.text(f"step {step}/{self._total}: {self._summary(step, metrics)}"))

    def _view(self, step: int, metrics: dict[str, Any]) -> Group:
        """Return the live view:

        step 12/500 ━━━━╺━━━━━━━━━━━ 0:03:12 left
        reward 0.420 ▁▂▂▃▅▆▇   held-out accuracy 0.310 (step 10)
        length 118   KL 0.0012   entropy 0.42   clipped 0 %   truncated 3 %   flat 12 %
        512 tokens/s   2.1 GiB   rollout 61 %   reward 2 %   reference 8 %   update 29 %
        """
        top = Table.grid(padding=(0, 1))
        top.add_row(
            f"step {step}/{self._total}",
            ProgressBar(total=self._total, completed=step, width=min(40, max(10, self._terminal.width - 40))),
            f"{self._left(step)} left" if step > self._start else "",
        )
        if "reward/mean" in metrics:
            self._rewards = [*self._rewards, float(metrics["reward/mean"])][-_SPARKS:]
        first = [f"{_REWARD.show(self._rewards[-1])} {sparkline(self._rewards)}"] if self._rewards else []
        first += self._held_out()
        second = _shown(metrics, *_SECOND_LINE)
        third = self._speed()
        if "memory/peak_gib" in metrics:
            third.append(f"{metrics['memory/peak_gib']:.1f} GiB")
        whole = metrics.get("time/step") or 0.0
        phases = [f"time/{name}" for name in ("rollout", "reward", "reference", "update")]
        if whole > 0:
            third += [f"{key.removeprefix('time/')} {metrics[key] / whole:.0%}" for key in phases if key in metrics]
        lines = [self._terminal.text("   ".join(line)) for line in (first, second, third) if line]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(top, *lines)

    def _panel(self, row: dict[str, Any], which: str) -> Panel:
        prompt = row.get("prompt", "")
        if isinstance(prompt, list):  # chat messages: the last one is the question
            prompt = prompt[-1].get("content", "") if prompt else ""
        reward = row.get("reward")
        title = f"step {row.get('step', '?')}, {which}" + ("" if reward is None else f", reward {reward:.3f}")
        question, answer = (self._terminal.text(_shorten(str(text))) for text in (prompt, row.get("completion", "")))
        question.stylize("dim")
        content = Text.assemble(question, "\n", answer)
        return Panel(content, title=Text(title), title_align="left")

    def _show_table(self, before: dict[str, float], after: dict[str, float]) -> None:
        keys = [key for key in dict.fromkeys([*before, *after]) if not is_interval(key)]
        if not keys:
            return
        table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)  # fits into 80 columns
        table.add_column("held out", overflow="fold")
        for heading in ("before", "after", "change"):
            table.add_column(heading, justify="right", no_wrap=heading == "change")
        for key in keys:
            old, new = before.get(key), after.get(key)
            change = "" if old is None or new is None else f"{new - old:+.3f}"
            cells = [key.removeprefix("eval/"), with_interval(before, key), with_interval(after, key), change]
            table.add_row(*(self._terminal.text(cell) for cell in cells))
        table.caption = "[95 % interval]" if any(map(is_interval, after)) else None
        self._terminal.print(table)


def sparkline(values: list[float]) -> str:
    """Return 0 1 3 2 as ▁▃█▆, from minimum to maximum; a flat line if all values are equal."""
    low, high = min(values), max(values)
    levels = "▁▂▃▄▅▆▇█"
    return "".join(levels[round((value - low) / (high - low) * 7) if high > low else 0] for value in values)


def _shown(metrics: dict[str, Any], *keys: str) -> list[str]:
    """Return "KL 0.0012" for each of the keys that has a value."""
    return [METRICS[key].show(metrics[key]) for key in keys if metrics.get(key) is not None]


def _about(seconds: float) -> str:
    """Format a duration: 45 -> 45 s; 200 -> 3 min; 8000 -> 2 h 13 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text) - _LONGEST} more characters)"
