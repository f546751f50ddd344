"""Messages to the user: records of the logger `grpo`, shown by one handler.

Modules log with `log = logging.getLogger(__name__)`. Importing grpo installs nothing. A command (runtime/command.py)
attaches `StderrHandler`; a training run replaces it with the console's handler (tracking/console.py).

INFO       shown by the main process
WARNING    shown by every rank; with several processes, after "[rank R] "
"""

import contextlib
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator

from grpo.runtime.redaction import redacted

LOGGER = "grpo"


class MessageHandler(logging.Handler):
    """Base of the handlers that this package attaches. A subclass writes the text of a record with `write`."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.addFilter(_is_shown_here)

    def write(self, text: str) -> None:
        raise NotImplementedError

    def format(self, record: logging.LogRecord) -> str:
        """Return the message without secrets, after the rank and the level of a warning."""
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{rank_prefix()}{record.levelname.lower()}: {text}"
        return redacted(text)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.write(self.format(record))
        except Exception:
            self.handleError(record)


class StderrHandler(MessageHandler):
    """Lines on standard error, so that standard output holds only a command's result."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk or a closed terminal
            sys.stderr.write(visible(text) + "\n")
            sys.stderr.flush()


def attach(handler: MessageHandler) -> None:
    """Show the messages of grpo with `handler`, in place of the handler that was attached before.

    Logging that an application has configured itself has priority. A level set on the logger `grpo` stays. Where the
    application shows this logger, or the root logger, on the terminal, `handler` is not attached: no line appears
    twice.
    """
    logger = logging.getLogger(LOGGER)
    for attached in list(logger.handlers):
        if isinstance(attached, MessageHandler):
            logger.removeHandler(attached)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    foreign = [*logger.handlers, *(logging.getLogger().handlers if logger.propagate else [])]
    if not any(map(_writes_to_terminal, foreign)):
        logger.addHandler(handler)


@contextlib.contextmanager
def command_messages() -> Iterator[None]:
    """Show the messages of a command on standard error. No record goes to the root logger meanwhile: a library that
    configures it would repeat every line.
    """
    logger = logging.getLogger(LOGGER)
    before = logger.propagate
    logger.propagate = False
    attach(StderrHandler())
    try:
        yield
    finally:
        logger.propagate = before


def is_main_process() -> bool:
    """Return whether the launcher made this process the first of the run, or the only one."""
    return os.environ.get("RANK", "").strip() in ("", "0")


def rank_prefix() -> str:
    """Return "[rank R] " in a run of several processes, otherwise ""."""
    several = os.environ.get("WORLD_SIZE", "").strip() not in ("", "0", "1")
    return f"[rank {os.environ.get('RANK', '0')}] " if several else ""


def visible(text: str) -> str:
    r"""Return `text` with control, format and bidirectional characters as their code: ESC -> \x1b. Line breaks stay."""
    return "".join(
        character
        if character == "\n" or unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def _is_shown_here(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or is_main_process()


def _writes_to_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None) or getattr(getattr(handler, "console", None), "file", None)
    return stream is not None and stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
