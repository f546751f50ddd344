"""trackio, a local database."""

import html
from collections.abc import Mapping
from typing import Any

from grpo.runtime.messages import visible
from grpo.tracking.tracker import CompletionsTable, TrackedRun, Tracker, register_tracker


@register_tracker("trackio")
class Trackio(Tracker):
    """A database in ~/.cache/huggingface/trackio (or TRACKIO_DIR). `trackio show` opens it.

    It cannot replace steps, so a resumed run leaves out the steps that it has.
    """

    library = "trackio"

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        import trackio

        self._trackio, self._last_step = trackio, run.last_step if run.resume_step else -1
        resume = "allow" if self._last_step >= 0 else "never"
        trackio.init(project=run.project, name=run.name, config=run.settings, resume=resume, embed=False)

    def log(self, step: int, metrics: Mapping[str, float], table: CompletionsTable | None) -> None:
        if step <= self._last_step:
            return
        logged: dict[str, Any] = dict(metrics)
        if table is not None:
            # Its pages render cells as Markdown and HTML, so completions are escaped.
            rows = [
                [html.escape(visible(cell)) if isinstance(cell, str) else cell for cell in row] for row in table.rows
            ]
            logged["completions"] = self._trackio.Table(columns=table.columns, data=rows)
        self._trackio.log(logged, step=step)

    def finish(self) -> None:
        self._trackio.finish()
