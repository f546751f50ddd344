"""The runs that all visitors of the dashboard share."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

from grpo.tracking.run_reader import RunFolder, find_runs


@dataclass
class Board:
    """The runs below a folder, each read once for all visitors."""

    root: Path
    feedback: Path
    _runs: dict[str, RunFolder] = field(default_factory=dict)
    _colors: int = 0
    """Runs that were given a color."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def refresh(self) -> list[str]:
        """Look for runs. Return their names, the newest run first."""
        with self._lock:
            found = {run.name: run for run in find_runs(self.root)}
            self._runs = {name: self._runs.get(name, run) for name, run in found.items()}
            return list(self._runs)

    def read_newest(self) -> None:
        """Read the run that a visitor sees first, ahead of the first visit."""
        self.chosen(self.refresh()[:1])

    def chosen(self, names: list[str] | None) -> list[RunFolder]:
        """Return the runs of these names with their newest steps. Unknown names are left out."""
        with self._lock:
            runs = [self._runs[name] for name in names or [] if name in self._runs]
            for run in runs:
                run.metrics.refresh()
                if run.color is None:  # kept for as long as the dashboard runs, whichever runs are chosen beside it
                    run.color, self._colors = self._colors, self._colors + 1
            return runs

    def models(self) -> dict[str, Path]:
        """Return saved models for the chat: label -> folder."""
        with self._lock:
            runs = list(self._runs.values())
        return {f"{run.name}/final": run.path / "final" for run in runs if (run.path / "final").is_dir()}
