"""Train steps of a run again and compare them with the record: python launch/verify.py --help."""

from grpo.cli import run

if __name__ == "__main__":
    run("verify")
