"""Rewards that fail as the completion requests, for tests of the workers: {"hang", "spin", "die", "raise", ...}."""

import math
import os
import signal
import subprocess
import time
from typing import Any

VALUES = {
    "nan": math.nan,
    "inf": math.inf,
    "huge": 1e7,
    "text": "1.0",
    "nested": [1.0],
    "none": None,
}


def faulty(completions: list[Any], **columns: Any) -> list[Any]:
    """Return the length of each completion, or fail as it requests."""
    return [_one(text) for text in completions]


def _one(text: str) -> Any:
    if text in VALUES:
        return VALUES[text]
    if text == "hang":
        time.sleep(1e9)
    if text == "spin":  # inside C code: no signal handler and no thread of this process gets a turn
        return 9**9**9**9
    if text == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "leave":
        os._exit(7)
    if text == "raise":
        raise ValueError("cannot read it")
    if text == "child":  # what it has started must not outlive it
        subprocess.run(["sleep", "1000"])
    return float(len(text))


def short(completions: list[Any], **columns: Any) -> list[float]:
    return [1.0]


def relative(completions: list[Any], **columns: Any) -> list[float]:
    """Compare completions with each other. A completion scored alone would always get 1."""
    if "raise" in completions:
        raise ValueError("cannot read it")
    return [len(text) / sum(len(other) for other in completions) for text in completions]


def steady(completions: list[Any], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def chatty(completions: list[Any], **columns: Any) -> list[float]:
    print("x" * 100_000, flush=True)
    return [1.0] * len(completions)


def code_points(completions: list[str], note: list[str], **_: Any) -> list[float]:
    """Return a number that depends on letters, their order and their normal form."""
    return [
        float(sum(place * ord(letter) for place, letter in enumerate(text + column, 1)) % 65_521)
        for text, column in zip(completions, note, strict=True)
    ]
