"""Feedback form below an answer: writes lines of the feedback file."""

from typing import Any, Literal

from grpo.errors import GrpoError
from grpo.tools.community.feedback import new_feedback
from grpo.tools.community.feedback_file import append_feedback
from grpo.tools.dashboard.board import Board
from grpo.tracking.markup import plain_markdown


def feedback_form(gr: Any, board: Board, inputs: list[Any], about: Any) -> None:
    """Lay the form out. Each button appends one line to the feedback file.

    Args:
        gr: The module gradio.
        board: Names the file.
        inputs: Widgets whose values `about` receives.
        about: Returns the fields that identify the answer.
    """
    with gr.Row(elem_classes=["feedback"]):
        correction = gr.Textbox(label="The right answer", lines=1, scale=3)
        note = gr.Textbox(label="Note", lines=1, scale=2)
        reviewer = gr.Textbox(label="Your pseudonym", lines=1, scale=1, min_width=120)
        consent = gr.Checkbox(False, label="May be used to train", scale=1, min_width=140)
    with gr.Row(elem_classes=["feedback"]):
        good = gr.Button("✓ right", size="sm")
        bad = gr.Button("✗ wrong", size="sm")
        better = gr.Button("✎ correct it", size="sm", variant="primary")
    told = gr.Markdown(elem_classes=["told"])

    def writer(verdict: Literal["accept", "reject", "correct"]) -> Any:
        def write(correction: str, note: str, reviewer: str, consent: bool, *given: Any) -> str:
            try:
                fields = about(*given)
                extra = {"correction": correction} if verdict == "correct" else {}
                record = new_feedback(verdict, note=note, reviewer=reviewer, consent=consent, **extra, **fields)
                append_feedback(board.feedback, record)
            except GrpoError as error:
                return f"Not written: {plain_markdown(str(error))}"
            return f"Written to {plain_markdown(board.feedback.name)}. Thank you." + (
                "" if consent else " Without your consent it is kept, and never used to train."
            )

        return write

    for button, verdict in ((good, "accept"), (bad, "reject"), (better, "correct")):
        button.click(
            writer(verdict),  # type: ignore[arg-type]
            [correction, note, reviewer, consent, *inputs],
            told,
            api_visibility="private",
            show_progress="hidden",
        )
