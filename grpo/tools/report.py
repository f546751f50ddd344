"""Write report.md and its PNG curves into a run directory.

Training writes them at its end. This command writes them for a run that was stopped, or writes them again.
"""

from pathlib import Path

from grpo.tools.arguments import command_parser


def main(argv: list[str]) -> None:
    """Run the command `grpo report`."""
    parser = command_parser("report", __doc__)
    parser.add_argument("--run", required=True, type=Path, help="the run directory")
    options = parser.parse_args(argv)
    from grpo.tracking.report import write_report

    print(write_report(options.run))
