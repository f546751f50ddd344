"""Write report.md and its PNG curves into a run directory. Training does this by itself at the end; this is for later.

python launch/report.py --run DIR
"""

import argparse
from pathlib import Path

from grpo.runtime.command import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="the run directory")
    from grpo.tracking.report import write_report

    print(write_report(parser.parse_args().run))


if __name__ == "__main__":
    run_main(main)
