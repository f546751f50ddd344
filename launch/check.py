"""Check a config without loading weights: python launch/check.py --help."""

from grpo.cli import run

if __name__ == "__main__":
    run("check")
