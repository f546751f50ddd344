"""Evaluate a saved model: python launch/evaluate.py --help."""

from grpo.cli import run

if __name__ == "__main__":
    run("evaluate")
