"""Saved models: the run that a model folder lies in, and what that run started from."""

import difflib
from pathlib import Path

from grpo.data.tokenizer import check_exists
from grpo.errors import ConfigError
from grpo.tracking.run_reader import RunFolder, find_runs

BASE_HELP = 'a second model to compare with; "run" = the model that the run of --model started from'


def check_model(model: str, option: str = "--model") -> None:
    """Check the place of a saved model, before a config is read or the hub is asked.

    Args:
        model: A folder, a GGUF file or a hub id.
        option: The option that names it, for the message.

    Raises:
        ConfigError: A run directory, a folder of runs, or a folder that does not exist.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            _check_no_run(path, option)
    elif path.suffix != ".gguf" and not path.is_file():
        parent = next((folder for folder in path.parents if folder.is_dir()), Path("."))
        runs = find_runs(parent) if parent != Path(".") else []
        if runs:  # "outputs/frist" has the form of a hub id
            names = [run.path.name for run in runs]
            near = difflib.get_close_matches(path.relative_to(parent).parts[0], names, n=1) or names[:1]
            count = f"{len(runs)} run{'s' if len(runs) != 1 else ''}"
            raise ConfigError(
                f"{option} {model}: there is no such folder. {parent} holds {count}: the model of {near[0]} is "
                f"{parent / near[0] / 'final'}"
            )
        check_exists(model)


def _check_no_run(path: Path, option: str) -> None:
    """Raise ConfigError for a run directory or a folder of runs, with the folder of the model."""
    runs = find_runs(path)
    if not runs:
        return
    if (path / "final").is_dir():
        raise ConfigError(f"{option} {path} is a run directory: its model is {path / 'final'}")
    if path not in [run.path for run in runs]:
        raise ConfigError(f"{option} {path} is a folder of runs: the model of the newest is {runs[0].path / 'final'}")
    raise ConfigError(
        f"{option} {path} is a run directory without final/: the run did not end. Finish it with --resume auto, or "
        f"take a checkpoint: python launch/export.py --run {path} --format merged --step N"
    )


def run_config_file(model: str) -> Path | None:
    """Return the config.yaml of the run whose final/ `model` is, or None."""
    path = Path(model).parent / "config.yaml"
    return path if path.is_file() else None


def resolve_base(model: str, base: str | None) -> str | None:
    """Return the base model to compare with.

    Args:
        model: A saved model.
        base: A folder, a hub id, "run" for the model that the run of `model` started from, or None.

    Raises:
        ConfigError: `base` is "run", and the run does not record its base model.
    """
    if base != "run":
        if base is not None:
            check_model(base, "--base")
        return base
    run_dir = Path(model).parent
    found = RunFolder(run_dir).base_model()
    if found is None:
        raise ConfigError(f"--base run: {run_dir} records no base model; give --base DIR")
    return found
