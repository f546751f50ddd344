"""Show runs in a browser: live curves, completions, comparison, chat with trained models, and a form for feedback.

Run directories are only read, during training or afterwards. Feedback is appended to --feedback. The server listens on
this machine only. Other hosts (--host 0.0.0.0, or --share for a public address) need a name and a password in
GRPO_DASHBOARD_AUTH=name:password (environment or .env). Remote access without them: ssh -L 7860:127.0.0.1:7860 MACHINE
"""

import os
from pathlib import Path

from grpo.errors import ConfigError
from grpo.tools.arguments import command_parser


def main(argv: list[str]) -> None:
    """Run the command `grpo dashboard`."""
    parser = command_parser("dashboard", __doc__)
    parser.add_argument("--runs", default="outputs", help="the folder that holds run directories, or one of them")
    parser.add_argument("--feedback", help="file that ratings and corrections go to; default: feedback.jsonl in --runs")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="a public address, through gradio's servers")
    options = parser.parse_args(argv)

    from grpo.tools.dashboard.app import serve

    root = Path(options.runs)
    feedback = Path(options.feedback) if options.feedback else root / "feedback.jsonl"
    serve(root, feedback, host=options.host, port=options.port, share=options.share, auth=read_auth())


def read_auth() -> tuple[str, str] | None:
    """Return (name, password) from GRPO_DASHBOARD_AUTH, or None. No flag: other users can read a command line."""
    from dotenv import dotenv_values

    value = os.environ.get("GRPO_DASHBOARD_AUTH") or dotenv_values(".env").get("GRPO_DASHBOARD_AUTH")
    if not value:
        return None
    name, _, password = value.partition(":")
    if not name or not password:
        raise ConfigError("GRPO_DASHBOARD_AUTH must be name:password; one of the two is empty")
    return name, password
