"""Fetch a small pretrained model: python launch/fetch.py --help."""

from grpo.cli import run

if __name__ == "__main__":
    run("fetch")
