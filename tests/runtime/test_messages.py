"""Messages of the logger `grpo`: ranks, streams, no repetition, no secrets."""

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo.runtime.messages import MessageHandler, StderrHandler, attach
from grpo.tracking.console import Display

ROOT = Path(__file__).parents[2]
log = logging.getLogger("grpo.somewhere")


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """Restore the logger after the test."""
    logger = logging.getLogger("grpo")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers[:] = [handler for handler in logger.handlers if not isinstance(handler, MessageHandler)]
    logger.setLevel(logging.NOTSET)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def python(program: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )


def test_the_main_process_shows_messages_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    Display(3)
    log.debug("not this")
    log.info("a message of %d lines", 1)
    log.warning("look out")
    assert capsys.readouterr().out == "a message of 1 lines\nwarning: look out\n"


def test_other_ranks_show_warnings_after_their_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        Display(3, enabled=rank == "0")
        log.info("a message of rank %s", rank)
        log.error("look out")
    assert capsys.readouterr().out == "a message of rank 0\n[rank 0] error: look out\n[rank 1] error: look out\n"


def test_messages_hold_no_secrets_and_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "CANARY-0123456789")
    for handler in (None, StderrHandler()):
        Display(3) if handler is None else attach(handler)
        log.info("401 for CANARY-0123456789 \x1b[2J")
    captured = capsys.readouterr()
    assert captured.out == captured.err == "401 for *** \\x1b[2J\n"


def test_a_handler_is_replaced_and_each_line_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    attach(StderrHandler())
    for _ in range(3):  # three runs in one notebook
        Display(3)
    log.info("once")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("once\n", "")


def test_an_application_that_shows_its_log_shows_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.getLogger(), "handlers", [*logging.getLogger().handlers, theirs])
    Display(3)
    log.info("once")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "once\n")


def test_an_application_that_writes_its_log_to_a_file_has_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(file)])
    Display(3)
    log.info("a line")
    assert capsys.readouterr().out == file.getvalue() == "a line\n"


def test_a_level_that_the_application_has_set_stays(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("grpo").setLevel(logging.WARNING)
    Display(3)
    log.info("too much")
    log.warning("enough")
    assert capsys.readouterr().out == "warning: enough\n"


@pytest.mark.slow
def test_an_import_changes_no_logging() -> None:
    done = python(
        "import logging, grpo.trainer; logger = logging.getLogger('grpo'); "
        "print(logger.handlers, logger.level, logger.propagate)"
    )
    assert done.stdout == "[] 0 True\n"


def test_a_command_writes_messages_to_standard_error_and_once() -> None:
    done = python(
        "import logging; from grpo.runtime.command import run_main\n"
        "def main():\n"
        "    logging.warning('a library that configures the root logger')\n"
        "    logging.getLogger('grpo.x').info('a message')\n"
        "    print('the result')\n"
        "run_main(main)"
    )
    assert done.stdout == "the result\n"
    assert done.stderr == "WARNING:root:a library that configures the root logger\na message\n"
