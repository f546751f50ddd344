"""Continue a run from a checkpoint with one change, and compare: python launch/fork.py --help."""

from grpo.cli import run

if __name__ == "__main__":
    run("fork")
