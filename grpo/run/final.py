"""final/: the trained model of a run, complete or not at all, with the step that its weights are of.

.tmp-final/final, .tmp-final/adapter     written first, then put in the place of final/ and adapter/
final/training.json                          {"format": 1, "step": 200, "steps": 200}
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

from grpo.errors import StorageError
from grpo.runtime.storage import remove, replace_folder, share_mode, sync, unused_name

log = logging.getLogger(__name__)

RECORD = "training.json"
FORMAT = 1


def write_final(run_dir: Path, step: int, steps: int, save: Callable[[Path], None], *, main: bool) -> None:
    """Write final/, and adapter/ of a run with an adapter. Collective, as `save` is.

    Args:
        run_dir: The run directory.
        step: The step that the weights are of.
        steps: Steps of the whole run.
        save: Writes the model into a folder, and its adapter into adapter/ beside it.
        main: This is the main process, which writes.

    Raises:
        StorageError: On the main process: it cannot be written. An earlier final/ is untouched.
    """
    whole = run_dir / ".tmp-final"
    try:
        if main:
            for pattern in (".tmp-final*", ".old-final*", ".old-adapter*"):  # of a process that was killed here
                for left in run_dir.glob(pattern):
                    remove(left)
            whole = unused_name(whole)
        save(whole / "final")
        if not main:
            return
        (whole / "final" / RECORD).write_text(json.dumps({"format": FORMAT, "step": step, "steps": steps}) + "\n")
        share_mode(whole)
        for path in [path for path in whole.rglob("*") if path.is_file()]:
            sync(path)
        for name in ("adapter", "final"):  # final/ last: its record says that both are there
            if (whole / name).is_dir():
                replace_folder(whole / name, run_dir / name)
        remove(whole)
        sync(run_dir)
    except Exception as error:
        if main:
            remove(whole)
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise StorageError(
            f"cannot write {run_dir / 'final'}: {error}. Free some space; then --resume auto --run_dir {run_dir} "
            "writes it"
        ) from error


def final_step(run_dir: Path) -> int | None:
    """Return the step that final/ is of. None: there is none, or it was written before this was recorded."""
    try:
        return int(json.loads((run_dir / "final" / RECORD).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
