"""The board: what everybody who looks at the dashboard shares, the runs as far as they have been read."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

from grpo.tracking.run_reader import RunFolder, find_runs


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

    def read_newest(self) -> None:
        """Read the run that a visitor sees first, before one comes."""
        self.chosen(self.refresh()[:1])

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
