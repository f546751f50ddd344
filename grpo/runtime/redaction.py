"""Redaction: text that is printed or written -> the same without the secrets that this process knows."""

import os
import re

_SECRET_NAME = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|wandb_v1_[A-Za-z0-9_-]{16,})")
_SHORTEST = 8
"""A shorter value is no secret, and would blot out half of every message."""


def redacted(text: str) -> str:
    """Values of environment variables that are named like secrets, and what looks like a key, become ***."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return _SECRET_VALUE.sub("***", text)
