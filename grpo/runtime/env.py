"""Keys from .env: HF_TOKEN and WANDB_* become environment variables. A variable that is already set wins.

Keys are neither in a config nor in a flag: configs are written into run directories, and flags are visible to every
user of the machine.
"""

import os
from pathlib import Path


def load_keys() -> None:
    """Read HF_TOKEN and WANDB_* from .env in the working directory, then from .env in the source checkout."""
    from dotenv import dotenv_values

    for folder in dict.fromkeys((Path.cwd(), source_checkout())):
        if folder is not None and (folder / ".env").is_file():
            for name, value in dotenv_values(folder / ".env", encoding="utf-8-sig").items():
                if (name == "HF_TOKEN" or name.startswith("WANDB_")) and value:
                    os.environ.setdefault(name, value)


def source_checkout() -> Path | None:
    """Return the project folder that this package is imported from; None for an installed wheel."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").is_file() else None
