"""TensorBoard."""

from collections.abc import Mapping
from typing import Any

from grpo.runtime.messages import visible
from grpo.tracking.report import fenced
from grpo.tracking.tracker import CompletionsTable, TrackedRun, Tracker, register_tracker


@register_tracker("tensorboard")
class TensorBoard(Tracker):
    """Event files in run_dir/tensorboard."""

    library = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides the values after the checkpoint that the run resumes from.
        folder = str(run.run_dir / "tensorboard")
        self._writer: Any = SummaryWriter(folder, purge_step=run.resume_step or None, flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float], table: CompletionsTable | None) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)  # plain: EventAccumulator.Scalars does not read the new style
        if table is not None:
            self._writer.add_text("completions", _markdown(table), step)

    def finish(self) -> None:
        self._writer.close()


def _markdown(table: CompletionsTable) -> str:
    """Return a table as Markdown: numbers as a line, prompt and completion as code blocks."""
    lines: list[str] = []
    for row in table.rows:
        cells = dict(zip(table.columns, row, strict=True))
        texts = f"{cells.pop('prompt')}\n---\n{cells.pop('completion')}"
        numbers = ", ".join(f"{key} {value}" for key, value in cells.items() if key != "step")
        lines += [f"`{visible(numbers).replace('`', ' ')}`", "", *fenced(texts), ""]
    return "\n".join(lines)
