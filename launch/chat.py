"""Talk to a saved model, beside its base if you like.

python launch/chat.py --model DIR [--base DIR | --base run] [--temperature 0.7] [--max_completion_length 512] [--ask TEXT]

Without --ask it reads questions from the terminal, one a line, until an empty one. Every question starts anew: the model
was trained on single questions. With --feedback FILE it asks after each answer what you think of it, and appends that
(docs/community.md).
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any, cast

from grpo.errors import ConfigError
from grpo.runtime.command import run_main
from grpo.tools.community.feedback import Feedback, append_feedback, checkpoint_sha, new_feedback


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
    parser.add_argument("--feedback", help="append what you say about the answers to this file (JSONL)")
    parser.add_argument("--reviewer", default="anonymous", help="with --feedback: a pseudonym, never your name")
    parser.add_argument("--consent", action="store_true", help="with --feedback: it may be used to train")
    parser.add_argument("--licence", default="", help="with --feedback: under which terms")
    ours = parser.parse_args()
    if ours.temperature < 0 or ours.max_completion_length < 1:
        raise ConfigError("--temperature must be at least 0 and --max_completion_length at least 1")

    from pathlib import Path

    from rich.columns import Columns
    from rich.console import Console
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    from grpo.runtime.messages import visible
    from grpo.tools.chat import answers, speakers
    from grpo.tracking.run_reader import RunFolder

    base = ours.base
    if base == "run":
        base = RunFolder(Path(ours.model).parent).base_model()
        if base is None:
            raise ConfigError(
                f"--base run: {Path(ours.model).parent} does not say what it started from; give --base DIR"
            )
    by_name = speakers(ours.model, base)
    console = Console(highlight=False)

    def reply(question: str) -> str:
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
            return so_far["trained"]
        *_, whole = stream
        for name, text in whole.items():
            console.print(Text(f"{name}: {visible(text)}"), soft_wrap=True)
        return whole["trained"]

    def read(what: str) -> str:
        return console.input(f"{what}: ") if sys.stdin.isatty() else input()

    if ours.ask is not None:
        reply(ours.ask)
        return
    weights = checkpoint_sha(ours.model) if ours.feedback is not None else ""
    while True:
        try:
            question = read("question")
            if not question.strip():
                return
            answer = reply(question)
            if ours.feedback is not None:
                said = asked(read, question, answer, vars(ours) | {"checkpoint_sha": weights})
                if said is not None:
                    append_feedback(ours.feedback, said)
        except (EOFError, KeyboardInterrupt):
            return


def asked(read: Callable[[str], str], question: str, answer: str, about: dict[str, Any]) -> Feedback | None:
    """What somebody thinks of an answer; None if they do not say. The right answer, the rating and the note are optional."""
    verdict = {"a": "accept", "r": "reject", "c": "correct"}.get(read("a = right, r = wrong, c = correct it").strip())
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


if __name__ == "__main__":
    run_main(main)
