"""best/: the model of the best evaluation so far, which final/ becomes with load_best_model_at_end.

best/final, best/adapter     written as final/ and adapter/ are (grpo/run/final.py)
best/best.json               {"step": 40, "metric": "eval/accuracy", "value": 0.61}
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate import Accelerator

from grpo.config.schema import Config
from grpo.errors import ConfigError
from grpo.run.final import final_step, write_final
from grpo.runtime.distributed import run_on_main

log = logging.getLogger(__name__)

RECORD = "best.json"


def find_best(config: Config, accelerator: Accelerator, run_dir: Path, start: int) -> "BestModel | None":
    """Return the best model so far of a run that goes on after step `start`. None without load_best_model_at_end."""
    if not config.load_best_model_at_end:
        return None
    metric, greater = config.metric_for_best_model, config.greater_is_better
    return run_on_main(accelerator, lambda: BestModel(run_dir, metric, greater, start))


class BestModel:
    """Keeps the model of the best evaluation.

    Args:
        run_dir: The run directory.
        metric: Key of the metric that decides.
        greater: Larger values are better. None: unless the key ends with loss.
        start: Steps done when the run was built: what is stored of later steps is not of this run.
    """

    def __init__(self, run_dir: Path, metric: str, greater: bool | None, start: int = 0) -> None:
        self.folder, self.metric = run_dir / "best", metric
        self.greater = not metric.endswith("loss") if greater is None else greater
        self.step, self.value = self._stored(start)

    def _stored(self, start: int) -> tuple[int, float | None]:
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            step, value = int(record["step"]), float(record["value"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, None
        same = record["metric"] == self.metric and step <= start and final_step(self.folder) == step
        return (step, value) if same else (0, None)

    def is_better(self, metrics: Mapping[str, float]) -> bool:
        """Return whether an evaluation is better than all before. Of equal ones, the first is kept.

        Raises:
            ConfigError: The evaluation has no such metric.
        """
        if not metrics:
            return False
        if self.metric not in metrics:
            known = ", ".join(sorted(key for key in metrics if key.startswith("eval/")))
            raise ConfigError(f"metric_for_best_model is {self.metric}, but the evaluations have: {known}")
        value = metrics[self.metric]
        return self.value is None or (value > self.value if self.greater else value < self.value)

    def keep(
        self, step: int, steps: int, metrics: Mapping[str, float], save: Callable[[Path], None], *, main: bool
    ) -> None:
        """Write the model of `step` in the place of the one before, if it is better. Collective, as `save` is.

        Raises:
            StorageError: It cannot be written. The one before is untouched.
        """
        if not self.is_better(metrics):
            return
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
        write_final(self.folder, step, steps, save, main=main)
        self.step, self.value = step, metrics[self.metric]
        if main:
            record = {"step": step, "metric": self.metric, "value": self.value}
            (self.folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        log.info("%s %.4g after step %d is the best so far", self.metric, self.value, step)

    def copy(self, folder: Path) -> None:
        """Copy the best model to `folder`, and its adapter beside it."""
        for name, target in (("final", folder), ("adapter", folder.parent / "adapter")):
            if (self.folder / name).is_dir():
                shutil.copytree(self.folder / name, target, dirs_exist_ok=True)
