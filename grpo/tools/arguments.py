"""Argument parsers that all commands share."""

import argparse


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of `grpo NAME`.

    Args:
        name: The command.
        description: Printed by --help as it stands, usually the module's docstring.
    """
    return argparse.ArgumentParser(
        prog=f"grpo {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
