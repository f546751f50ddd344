"""Environment variables: keys from .env, numbers, and variables that are set but empty.

HF_TOKEN and WANDB_* of .env become environment variables. A variable that is already set wins. Keys are neither in a
config nor in a flag: configs are written into run directories, and flags are visible to every user of the machine.
"""

import codecs
import io
import logging
import os
from pathlib import Path

from grpo.errors import ConfigError

log = logging.getLogger(__name__)

_LAUNCH = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "ROLE_RANK"}
_LAUNCH |= {"MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}


def load_keys() -> None:
    """Read HF_TOKEN and WANDB_* from .env in the working directory, then from .env in the source checkout.

    A file that cannot be read is passed over with a warning.
    """
    from dotenv import dotenv_values

    folders = [source_checkout()]
    try:
        folders.insert(0, Path.cwd())
    except OSError as error:  # the working directory was removed
        log.warning("the working directory cannot be read: %s", error)
    for folder in dict.fromkeys(folders):
        if folder is None:
            continue
        try:
            if not (folder / ".env").is_file():
                continue
            text = decoded((folder / ".env").read_bytes())
        except OSError as error:
            log.warning("%s is passed over: %s", folder / ".env", error.strerror or error)
            continue
        for name, value in dotenv_values(stream=io.StringIO(text)).items():
            if (name == "HF_TOKEN" or name.startswith("WANDB_")) and value:
                try:
                    os.environ.setdefault(name, value)
                except ValueError:  # a NUL character
                    log.warning("%s: the value of %s is no text and is passed over", folder / ".env", name)


def decoded(content: bytes) -> str:
    """Return the text of a file in UTF-8, in UTF-16 (PowerShell's `>`), or in the code page of Windows."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if content.startswith(mark):
            return content.decode(encoding, "replace")
    if b"\0" in content:  # UTF-16 without a mark: every other byte of ASCII is 0
        return content.decode("utf-16-be" if content[:1] == b"\0" else "utf-16-le", "replace")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def drop_empty_variables() -> None:
    """Remove variables of the launch that are set but empty, as job scripts leave them. Libraries expect a number."""
    for name in [name for name, value in os.environ.items() if not value.strip()]:
        if name in _LAUNCH or name.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_")):
            del os.environ[name]


def env_count(name: str, default: int) -> int:
    """Return the number in a variable: the first of a list ("2,1"), `default` where it is not set or empty.

    Raises:
        ConfigError: It is no whole number.
    """
    text = os.environ.get(name, "").split(",")[0].strip()
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"the environment variable {name} is '{os.environ[name]}', needs to be a whole number: unset it, or set a "
            "number"
        ) from None


def source_checkout() -> Path | None:
    """Return the project folder that this package is imported from; None for an installed wheel."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").is_file() else None
