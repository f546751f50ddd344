"""Chat with a saved model, optionally beside its base.

    grpo chat --model DIR [--base DIR | --base run] [--temperature 0.7] [--max_completion_length 512] [--ask TEXT]
    grpo chat --model DIR --tools                            run the tools of its run, whose results the model reads

Without --ask, questions are read from the terminal, one per line, until an empty line. Every question starts a new
conversation, because the model was trained on single questions. With --feedback FILE the command asks for a judgement
after each answer and appends it to the file (docs/community.md).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

from grpo.errors import ConfigError
from grpo.tools.arguments import command_parser
from grpo.tools.community.feedback import Feedback, checkpoint_sha, new_feedback
from grpo.tools.community.feedback_file import append_feedback
from grpo.tools.saved_model import BASE_HELP, check_model, resolve_base


def main(argv: list[str]) -> None:
    """Run the command `grpo chat`."""
    parser = command_parser("chat", __doc__)
    parser.add_argument("--model", required=True, help="a model folder (a run's final/) or a hub id")
    parser.add_argument("--base", help=BASE_HELP)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--max_completion_length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ask", help="one question; the command prints the answer and ends")
    parser.add_argument(
        "--tools", action="store_true", help="run the tools of the model's run; imports the files that its config names"
    )
    parser.add_argument("--feedback", help="append your judgements of the answers to this file (JSONL)")
    parser.add_argument("--reviewer", default="anonymous", help="with --feedback: a pseudonym, never your name")
    parser.add_argument("--consent", action="store_true", help="with --feedback: it may be used to train")
    parser.add_argument("--licence", default="", help="with --feedback: its licence")
    options = parser.parse_args(argv)
    if options.temperature < 0 or options.max_completion_length < 1:
        raise ConfigError("--temperature must be at least 0 and --max_completion_length at least 1")

    check_model(options.model)
    from grpo.tools.chat_models import load_chat_models

    models = load_chat_models(options.model, resolve_base(options.model, options.base), with_tools=options.tools)
    terminal = Terminal(models, options)
    if options.ask is not None:
        terminal.reply(options.ask)
    else:
        converse(terminal, options)


def converse(terminal: "Terminal", options: argparse.Namespace) -> None:
    """Answer questions until an empty line, the end of the input, or Ctrl-C."""
    with_feedback = options.feedback is not None
    about = vars(options) | {"checkpoint_sha": checkpoint_sha(options.model) if with_feedback else ""}
    try:
        while (question := terminal.read("question")).strip():
            answer = terminal.reply(question)
            judgement = ask_judgement(terminal.read, question, answer, about) if with_feedback else None
            if judgement is not None:
                append_feedback(options.feedback, judgement)
    except (EOFError, KeyboardInterrupt):
        return


class Terminal:
    """Questions from the terminal or a pipe, answers to it."""

    def __init__(self, models: dict[str, Any], options: argparse.Namespace):
        from rich.console import Console

        self.models, self.options = models, options
        self.console = Console(highlight=False)

    def read(self, label: str) -> str:
        """Read one line; the label is shown in a terminal only."""
        return self.console.input(f"{label}: ") if sys.stdin.isatty() else input()

    def reply(self, question: str) -> str:
        """Show the answers, in a terminal side by side as they grow. Return the trained model's answer."""
        from rich.text import Text

        from grpo.runtime.messages import visible
        from grpo.tools.chat_models import stream_answers

        states = stream_answers(
            self.models,
            question,
            max_completion_length=self.options.max_completion_length,
            temperature=self.options.temperature,
            seed=self.options.seed,
        )
        if self.console.is_terminal:
            return self._show_live(states)["trained"]
        *_, last = states
        for name, text in last.items():
            self.console.print(Text(f"{name}: {visible(text)}"), soft_wrap=True)
        return last["trained"]

    def _show_live(self, states: Iterator[dict[str, str]]) -> dict[str, str]:
        from rich.columns import Columns
        from rich.live import Live
        from rich.panel import Panel
        from rich.text import Text

        from grpo.runtime.messages import visible

        width = self.console.width // len(self.models)
        last: dict[str, str] = {}
        with Live(console=self.console, refresh_per_second=12) as live:
            for last in states:
                panels = [Panel(Text(visible(text)), title=name, width=width) for name, text in last.items()]
                live.update(Columns(panels, padding=0))
        return last


def ask_judgement(read: Callable[[str], str], question: str, answer: str, about: dict[str, Any]) -> Feedback | None:
    """Ask for a judgement of an answer.

    Args:
        read: Reads one line; its argument is the label.
        about: `reviewer`, `consent`, `licence`, `model` and `checkpoint_sha` of the record.

    Returns:
        The feedback, or None if no verdict was given. Correction, rating and note are optional.
    """
    verdict = {"a": "accept", "r": "reject", "c": "correct"}.get(
        read("the trained model's answer: a = right, r = wrong, c = correct it").strip()
    )
    if verdict is None:
        return None
    correction = read("the right answer").strip() if verdict == "correct" else ""
    if verdict == "correct" and not correction:
        verdict = "reject"
    rating = read("1 to 5, or nothing").strip()
    return new_feedback(
        cast(Any, verdict),
        prompt=question,
        completion=answer,
        correction=correction or None,
        rating=int(rating) if rating in ("1", "2", "3", "4", "5") else None,
        note=read("note, or nothing").strip(),
        reviewer=about["reviewer"],
        consent=about["consent"],
        licence=about["licence"],
        model_id=str(about["model"]),
        checkpoint_sha=about["checkpoint_sha"],
    )
