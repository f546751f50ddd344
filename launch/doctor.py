"""Check the trainer on this machine: python launch/doctor.py --help."""

from grpo.cli import run

if __name__ == "__main__":
    run("doctor")
