"""Talk to a saved model, beside its base if you like.

python launch/chat.py --model DIR [--base DIR | --base run] [--temperature 0.7] [--max_completion_length 512] [--ask TEXT]

Without --ask it reads questions from the terminal, one a line, until an empty one. Every question starts anew: the model
was trained on single questions.
"""

import argparse
import sys

from grpo.errors import ConfigError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a model folder (a run's final/) or a hub id")
    parser.add_argument(
        "--base", help='a second model that answers beside it; "run" = what the run of --model started from'
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--max_completion_length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ask", help="one question; the answer is printed and the command ends")
    ours = parser.parse_args()
    if ours.temperature < 0 or ours.max_completion_length < 1:
        raise ConfigError("--temperature must be at least 0 and --max_completion_length at least 1")

    from pathlib import Path

    from rich.columns import Columns
    from rich.console import Console
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    from grpo.chat import answers, speakers
    from grpo.dashboard.readers import RunFolder
    from grpo.display import visible

    base = ours.base
    if base == "run":
        base = RunFolder(Path(ours.model).parent).base_model()
        if base is None:
            raise ConfigError(
                f"--base run: {Path(ours.model).parent} does not say what it started from; give --base DIR"
            )
    by_name = speakers(ours.model, base)
    console = Console(highlight=False)

    def reply(question: str) -> None:
        stream = answers(
            by_name,
            question,
            longest=ours.max_completion_length,
            temperature=ours.temperature,
            seed=ours.seed,
        )
        if console.is_terminal:
            width = console.width // len(by_name)
            with Live(console=console, refresh_per_second=12) as live:
                for so_far in stream:
                    panels = [Panel(Text(visible(text)), title=name, width=width) for name, text in so_far.items()]
                    live.update(Columns(panels, padding=0))
            return
        *_, whole = stream
        for name, text in whole.items():
            console.print(Text(f"{name}: {visible(text)}"), soft_wrap=True)

    if ours.ask is not None:
        reply(ours.ask)
        return
    while True:
        try:
            question = console.input("question: ") if sys.stdin.isatty() else input()
        except (EOFError, KeyboardInterrupt):
            return
        if not question.strip():
            return
        reply(question)


if __name__ == "__main__":
    run_main(main)
