"""Train on human feedback in cycles: python launch/community.py --help."""

from grpo.cli import run

if __name__ == "__main__":
    run("community")
