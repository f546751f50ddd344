"""Show runs in a browser: python launch/dashboard.py --help."""

from grpo.cli import run

if __name__ == "__main__":
    run("dashboard")
