"""Argument parsers that all commands share."""

import argparse
import os
from collections.abc import Sequence
from typing import Any


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of `grpo NAME`.

    Args:
        name: The command.
        description: Printed by --help as it stands, usually the module's docstring.
    """
    return _Parser(
        prog=f"grpo {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


class _Parser(argparse.ArgumentParser):
    """Parser that reads ~ at the start of a value as the home folder: a shell leaves it alone in `--run=~/x`."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        options, rest = super().parse_known_args(args, namespace)
        for name, value in vars(options).items():
            if isinstance(value, str) and value.startswith("~"):
                setattr(options, name, os.path.expanduser(value))
        return options, rest
