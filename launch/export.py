"""Export a run: python launch/export.py --help."""

from grpo.cli import run

if __name__ == "__main__":
    run("export")
