"""Saved models: the run that a model folder lies in, and what that run started from."""

from pathlib import Path

from grpo.errors import ConfigError
from grpo.tracking.run_reader import RunFolder

BASE_HELP = 'a second model to compare with; "run" = the model that the run of --model started from'


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
        return base
    run_dir = Path(model).parent
    found = RunFolder(run_dir).base_model()
    if found is None:
        raise ConfigError(f"--base run: {run_dir} records no base model; give --base DIR")
    return found
