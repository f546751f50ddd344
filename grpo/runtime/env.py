"""Keys: .env -> the environment variables that the hub's and W&B's libraries look for. A variable that is set already wins.

Keys are in no config and no flag: configs are written into run directories, and flags are seen by everyone on the machine.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_keys() -> None:
    """HF_TOKEN and WANDB_... from .env in the working directory, then from the one in the project's folder."""
    from dotenv import dotenv_values

    for folder in dict.fromkeys((Path.cwd(), ROOT)):
        if (folder / ".env").is_file():
            for name, value in dotenv_values(folder / ".env", encoding="utf-8-sig").items():
                if (name == "HF_TOKEN" or name.startswith("WANDB_")) and value:
                    os.environ.setdefault(name, value)
