"""Redaction of secrets in text that is printed or written."""

import os
import re

_SECRET_NAME = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|wandb_v1_[A-Za-z0-9_-]{16,})")
_MIN_LENGTH = 8
"""A shorter value is not a secret, and replacing it would make messages unreadable."""


def redacted(text: str) -> str:
    """Replace values of environment variables that are named like secrets, and texts that look like keys, by ***."""
    for name, value in os.environ.items():
        if len(value) >= _MIN_LENGTH and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return _SECRET_VALUE.sub("***", text)
