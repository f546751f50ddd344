"""GRPO for language models of 0.5B to 8B parameters: the public API. Names are imported on first use."""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

if "OMP_WAIT_POLICY" not in os.environ:
    # Iterations that an OpenMP thread spins before it sleeps, read when torch is first imported. The default of libgomp
    # spins for milliseconds: beside other programs, a thread then waits for one that has lost its core (docs/speed.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Public name -> the module that defines it. `__init__.pyi` lists the same names for type checkers.
_PUBLIC = {
    "Config": "grpo.config.schema",
    "GRPOConfig": "grpo.compat.arguments",
    "GRPOTrainer": "grpo.compat.trl",
    "load_config": "grpo.config.parser",
    "train": "grpo.trainer",
    "register_advantage": "grpo.advantages",
    "register_dataset": "grpo.data.registry",
    "register_engine": "grpo.rollout.engine",
    "register_kl": "grpo.kl",
    "register_loss": "grpo.losses",
    "register_reward": "grpo.rewards.registry",
    "register_tracker": "grpo.tracking.tracker",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'grpo' has no attribute '{name}'")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
