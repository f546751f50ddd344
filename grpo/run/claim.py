"""Claim: the run directory is created, locked and found as it was before the weights loaded."""

import logging
from pathlib import Path

from accelerate import Accelerator

from grpo.config.schema import Config
from grpo.errors import ConfigError, StorageError
from grpo.run.checkpoint import seconds_to_write
from grpo.runtime.distributed import run_on_main
from grpo.runtime.launcher import shutdown_seconds
from grpo.runtime.run_lock import RunLock
from grpo.tracking.run_dir import fingerprint, has_chosen_name

log = logging.getLogger(__name__)


def claim_run_dir(
    config: Config, run_dir: Path, before: tuple[object, ...], accelerator: Accelerator
) -> tuple[Path, RunLock | None]:
    """Create and lock the run directory, and look again whether it is as it was before the weights loaded. Collective.

    Args:
        before: `fingerprint` of the run directory at the start.

    Returns:
        The run directory: with a number added, if it was named here and another run took the name meanwhile. And the
        lock, on the main process.

    Raises:
        ConfigError: Another run uses it, or has written into it.
        StorageError: It cannot be written.
    """
    lock: RunLock | None = None

    def claim() -> Path:
        nonlocal lock
        names = [run_dir]
        if not has_chosen_name(config):
            names += [run_dir.with_name(f"{run_dir.name}-{number}") for number in range(2, 1000)]
        for path in names:
            try:
                path.mkdir(parents=True, exist_ok=has_chosen_name(config))
                lock = RunLock(path)
                break
            except OSError as error:
                if isinstance(error, FileExistsError) and not has_chosen_name(config):
                    continue
                raise StorageError(f"cannot write the run directory {path}: {error}. Set another --run_dir") from error
        if path == run_dir and fingerprint(path) != before:
            assert lock is not None
            lock.release()
            raise ConfigError(
                f"run_dir {path} was written by another run while this one loaded. Continue that run with --resume "
                f"auto, or choose another --run_dir"
            )
        return path

    return run_on_main(accelerator, claim), lock


def warn_of_slow_saves(run_dir: Path, size: int) -> None:
    """Warn if torchrun would kill its workers before a checkpoint of `size` bytes is saved after a signal."""
    limit = shutdown_seconds()
    if limit is None:
        return
    seconds = seconds_to_write(run_dir, size)
    if seconds > limit / 2:
        log.warning(
            "a checkpoint of %.1f GB takes about %.0f s to save here, and torchrun kills its workers %.0f s after a "
            "signal: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT to at least %.0f, or save often (save_every)",
            *(size / 1e9, seconds, limit, 2 * seconds + 30),
        )
