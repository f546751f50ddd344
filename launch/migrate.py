"""Turn a script for TRL into a config and rewards: python launch/migrate.py script.py [--output FOLDER]."""

from grpo.cli import run

if __name__ == "__main__":
    run("migrate")
