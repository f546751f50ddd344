"""Look at runs in a browser: live curves, completions, comparison, chat with what was trained, and your word about answers.

python launch/dashboard.py --runs outputs [--port 7860] [--feedback FILE]

It only reads the run directories, while they are training or afterwards; what you say about answers goes to --feedback. It
listens on this machine alone. To let others in (--host 0.0.0.0, or --share for a public address), set a name and a password
in GRPO_DASHBOARD_AUTH=name:password (environment or .env). From afar without that: ssh -L 7860:127.0.0.1:7860 MACHINE
"""

import argparse
import os
from pathlib import Path

from grpo.errors import ConfigError
from grpo.runtime.command import run_main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", default="outputs", help="the folder that holds run directories, or one of them")
    parser.add_argument("--feedback", help="where thumbs and corrections go; default: feedback.jsonl in --runs")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="a public address, through gradio's servers")
    ours = parser.parse_args()

    from grpo.tools.dashboard.app import serve

    root = Path(ours.runs)
    feedback = Path(ours.feedback) if ours.feedback else root / "feedback.jsonl"
    serve(root, feedback, host=ours.host, port=ours.port, share=ours.share, auth=_auth())


def _auth() -> tuple[str, str] | None:
    """(name, password) from GRPO_DASHBOARD_AUTH. Never a flag: flags are seen by everybody on the machine."""
    from dotenv import dotenv_values

    given = os.environ.get("GRPO_DASHBOARD_AUTH") or dotenv_values(".env").get("GRPO_DASHBOARD_AUTH")
    if not given:
        return None
    name, _, password = given.partition(":")
    if not name or not password:
        raise ConfigError("GRPO_DASHBOARD_AUTH must be name:password, and both must be there")
    return name, password


if __name__ == "__main__":
    run_main(main)
