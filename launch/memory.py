"""Estimate the memory of a config: python launch/memory.py --help."""

from grpo.cli import run

if __name__ == "__main__":
    run("memory")
