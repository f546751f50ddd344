"""Checkpoint storage: tensors and plain state <-> run_dir/checkpoints/step-N, complete or not at all.

    .tmp-step-200/          written first, each file synced to disk
        policy.safetensors      one file per named set of tensors
        optimizer.safetensors
        state.json              everything that is not a tensor; no pickle, which can run code when it is loaded
        manifest.json           size and sha256 of every file above
    step-200/               the same folder, renamed at the end: a folder with this name is complete

Storage only: grpo/run/checkpointer.py decides what a checkpoint holds.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo.errors import StorageError
from grpo.models.optimizer_state import Tensors
from grpo.runtime.storage import remove, replace_folder, share_mode, sync, unused_name, warn_once

log = logging.getLogger(__name__)


def save_checkpoint(run_dir: Path, step: int, tensors: Tensors, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint and return its folder. Keep the newest `keep` of this one and those before it.

    Raises:
        StorageError: It cannot be written. Nothing of it is left, and older checkpoints are untouched.
    """
    folder = run_dir / "checkpoints"
    final, temporary = folder / f"step-{step}", folder / f".tmp-step-{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean_up(folder)
        temporary = unused_name(temporary)  # where the remains of an earlier save cannot be removed
        free = _free(folder)
        if free is not None and free < _size(tensors):  # do not fill the disk first
            raise OSError(errno.ENOSPC, f"only {_megabytes(free)} are free")
        temporary.mkdir()
        for name, group in tensors.items():
            save_file(_storable(group), temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
        share_mode(temporary)
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        replace_folder(temporary, final)  # it exists where a run was resumed from an earlier step
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            _clean_up(folder)
        raise StorageError(
            f"cannot save the checkpoint {final}: {error}. It needs {_megabytes(_size(tensors))} of free space; older "
            f"checkpoints are untouched. Free some space, lower save_total_limit, or set another run_dir"
        ) from error
    _prune(folder, step, keep)
    return final


def check_free_space(run_dir: Path, checkpoint: int, final: int, keep: int) -> None:
    """Check the free disk space for the files of a run before anything is written.

    Warns if `keep` checkpoints, and one more while an old one still exists, do not fit.

    Args:
        checkpoint: Size of one checkpoint in bytes.
        final: Size of the trained model in bytes.

    Raises:
        StorageError: Not even one checkpoint and the model fit.
    """
    free = _free(run_dir)
    if free is None:
        return
    numbers = (
        f"{_megabytes(free)} are free for {run_dir}; a checkpoint takes about {_megabytes(checkpoint)}, "
        f"final/ {_megabytes(final)}"
    )
    if free < checkpoint + final:
        raise StorageError(f"{numbers}: this run could not be saved. Free some space, or set another run_dir")
    there = len(_saved(run_dir / "checkpoints")) if (run_dir / "checkpoints").is_dir() else 0
    if free < checkpoint * max(1, keep + 1 - there) + final:
        more = f"save_total_limit {keep} will not fit, for which one more than that must fit for a moment"
        log.warning("%s: %s", numbers, more)


def seconds_to_write(run_dir: Path, size: int) -> float:
    """Estimate how long a checkpoint of `size` bytes takes, from a small file. 0 where that cannot be measured."""
    sample = min(size, 16_000_000)
    path = unused_name(run_dir / ".tmp-speed")
    try:
        began = time.perf_counter()
        path.write_bytes(bytes(sample))
        sync(path)
        _fingerprint(path)
        return (time.perf_counter() - began) * size / max(1, sample)
    except OSError:
        return 0.0
    finally:
        remove(path)


def load_checkpoint(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors (on the CPU) and the state of a checkpoint. Raises StorageError if a bit is wrong."""
    names = _verify(path)
    try:
        tensors = {
            name.removesuffix(".safetensors"): load_file(path / name) for name in names if name.endswith(".safetensors")
        }
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise StorageError(f"cannot read the checkpoint {path}: {error}") from error
    return tensors, state


def read_state(path: Path) -> dict[str, Any]:
    """Return the state alone, without reading or verifying the tensors."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if isinstance(state, dict):
            return state
        raise ValueError(f"it holds a {type(state).__name__}")
    except PermissionError as error:
        raise _not_readable(path / "state.json", error) from error
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path / 'state.json'} is damaged: {error}. Choose another checkpoint for --resume"
        ) from error


def newest_valid(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint (None if there is none), and why each newer one is ignored.

    Raises:
        StorageError: This user may not read the checkpoints.
    """
    folder = run_dir / "checkpoints"
    try:
        if not folder.is_dir():
            return None, []
        _put_back_replaced(folder)
        saved = _saved(folder)
    except PermissionError as error:
        raise _not_readable(folder, error) from error
    reasons: list[str] = []
    for path in reversed(saved):
        try:
            _verify(path)
        except UnreadableError:
            raise
        except StorageError as error:
            reasons.append(f"ignoring {path.name}: {error}")
        else:
            return path, reasons
    return None, reasons


class UnreadableError(StorageError):
    """This user may not read a file. That is no damage: an older checkpoint must not take its place."""


def _not_readable(path: Path, error: OSError) -> UnreadableError:
    return UnreadableError(
        f"cannot read {path}: {error.strerror}. Ask its owner for read permission, or set another run_dir"
    )


def _storable(group: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors needs them: on the CPU, contiguous, none sharing memory with another."""
    storable: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in group.items():
        own = tensor.detach().to("cpu").contiguous()
        memory = own.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != own.nbytes:
            own = own.clone()
        seen.add(memory.data_ptr())
        storable[name] = own
    return storable


def _verify(path: Path) -> list[str]:
    """Return the names of the checkpoint's files. Raises StorageError unless all are exactly as they were written."""
    try:
        return _verified(path)
    except PermissionError as error:
        raise _not_readable(Path(str(error.filename or path)), error) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}. Choose another checkpoint for --resume") from error


def _verified(path: Path) -> list[str]:
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        raise StorageError(
            f"{path} has no manifest.json: it is no complete checkpoint. Choose another one for --resume"
        )
    try:
        files = json.loads(manifest_path.read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{manifest_path} is damaged: {error!r}. Choose another checkpoint for --resume") from error
    for name, (size, sha256) in {"state.json": (0, ""), **expected}.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise StorageError(f"{file} is missing: choose another checkpoint for --resume")
        found = file.stat().st_size
        if found != size:
            raise StorageError(
                f"{file} is damaged: {_megabytes(found)} of {_megabytes(size)} ({found} of {size} bytes). "
                f"Choose another checkpoint for --resume"
            )
        if _fingerprint(file)["sha256"] != sha256:
            raise StorageError(
                f"{file} is damaged: its {_megabytes(size)} ({size} bytes) are not the ones that were written (sha256 "
                f"differs). Choose another checkpoint for --resume"
            )
    return list(expected)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _saved(folder: Path) -> list[Path]:
    """Return the step-N folders, oldest first."""
    steps = [(int(match[1]), path) for path in folder.iterdir() if (match := re.fullmatch(r"step-(\d+)", path.name))]
    return [path for _, path in sorted(steps)]


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove older checkpoints. One that cannot be removed stays: the new checkpoint is already safe."""
    up_to_now = [path for path in _saved(folder) if int(path.name.removeprefix("step-")) <= step]
    with contextlib.suppress(OSError):
        for path in up_to_now[: -max(keep, 1)]:
            # Rename first: an interrupted removal must not leave half a checkpoint under a valid name.
            try:
                os.replace(path, unused_name(folder / f".tmp-{path.name}"))
            except OSError as error:
                warn_once("remove", f"cannot remove {path}: {error.strerror}. It is left there, and training goes on")
        _clean_up(folder)


def _put_back_replaced(folder: Path) -> None:
    """Undo a replacement that was interrupted between its two renames."""
    for path in folder.glob(".old-step-*"):
        valid_name = folder / path.name.removeprefix(".old-").partition(".")[0]
        if not os.path.lexists(valid_name):
            with contextlib.suppress(OSError):  # another process was faster, or nothing can be written here
                os.replace(path, valid_name)


def _clean_up(folder: Path) -> None:
    """Remove the remains of interrupted saves. What cannot be removed is left."""
    _put_back_replaced(folder)
    for path in folder.glob(".old-step-*"):
        # Under another name, which is never put back: the checkpoint that replaced it may be pruned first.
        with contextlib.suppress(OSError):
            os.replace(path, unused_name(folder / path.name.replace(".old-", ".tmp-", 1)))
    for path in folder.glob(".tmp-step-*"):
        remove(path)


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for group in tensors.values() for tensor in group.values())


def _free(path: Path) -> int | None:
    """Return the free bytes of the file system of `path`. None: it does not report them."""
    try:
        while not path.exists():
            path = path.parent
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return usage.free if usage.total else None


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
