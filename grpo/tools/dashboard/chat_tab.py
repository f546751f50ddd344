"""Chat tab: a question, and the answers of a saved model and its base side by side as they grow."""

from collections.abc import Iterator
from typing import Any

from grpo.errors import ConfigError, GrpoError
from grpo.runtime.messages import visible
from grpo.tools.community.feedback import checkpoint_sha
from grpo.tools.dashboard.board import Board
from grpo.tools.dashboard.feedback_form import feedback_form
from grpo.tracking.markup import plain_markdown
from grpo.tracking.run_reader import RunFolder


class _LoadedModels:
    """The pair of models in memory: the last one asked."""

    def __init__(self) -> None:
        self._key: tuple[str, str | None] | None = None
        self._loaded: Any = None

    def get(self, model: str, base: str | None) -> Any:
        from grpo.tools.chat_models import load_chat_models

        if self._key != (model, base):
            self._key, self._loaded = None, None  # one pair at a time: free the old one before loading
            self._loaded = load_chat_models(model, base)
            self._key = (model, base)
        return self._loaded


def chat_tab(gr: Any, board: Board, tab: Any, page: Any) -> None:
    """Lay the tab out and connect its events."""
    loaded = _LoadedModels()
    with gr.Row():
        model = gr.Dropdown([], label="Model", scale=3, elem_id="model")
        beside = gr.Checkbox(True, label="Beside its base", scale=1, min_width=140)
        temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0 = greedy)", scale=2)
        longest = gr.Slider(16, 2048, 256, step=16, label="Maximum tokens", scale=2)
    question = gr.Textbox(
        label="Your question", placeholder="Asked as in training: with that run's system prompt", elem_id="question"
    )
    ask = gr.Button("Ask", variant="primary", elem_id="ask")
    with gr.Row(equal_height=True):
        base_answer = gr.Textbox(label="Base", lines=8, max_lines=24, elem_id="base-answer")
        trained_answer = gr.Textbox(label="Trained", lines=8, max_lines=24, elem_id="trained-answer")
    trouble = gr.Markdown()
    asked = gr.State({})
    gr.Markdown("Your judgement of the trained model's answer:")

    def reply(
        name: str | None, with_base: bool, temperature: float, longest: float, question: str
    ) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
        folder = board.models().get(name or "")
        if folder is None or not question.strip():
            yield "", "", "Choose a model and ask a question.", {}
            return
        base = RunFolder(folder.parent).base_model() if with_base else None
        fields = {"prompt": question, "model_id": str(folder)}
        try:
            from grpo.tools.chat_models import stream_answers

            yield "", "", "Loading...", {}
            pair = loaded.get(str(folder), base)
            for so_far in stream_answers(
                pair, question, max_completion_length=int(longest), temperature=float(temperature)
            ):
                trained = visible(so_far["trained"])
                yield visible(so_far.get("base", "")), trained, "", fields | {"completion": so_far["trained"]}
        except GrpoError as error:
            yield "", "", plain_markdown(str(error)), {}
        except Exception as error:  # e.g. out of memory: shown on the page too, not only in the terminal
            yield "", "", plain_markdown(f"{type(error).__name__}: {error}"), {}

    def models(chosen: str | None) -> Any:
        board.refresh()
        found = list(board.models())
        return gr.Dropdown(choices=found, value=chosen if chosen in found else (found[0] if found else None))

    for event in (ask.click, question.submit):
        event(
            reply,
            [model, beside, temperature, longest, question],
            [base_answer, trained_answer, trouble, asked],
            concurrency_limit=1,
            concurrency_id="chat",
            api_visibility="private",
            show_progress="hidden",
        )

    def about(fields: dict[str, Any]) -> dict[str, Any]:
        if not fields:
            raise ConfigError("ask a question first")
        return fields | {"checkpoint_sha": checkpoint_sha(fields["model_id"])}

    feedback_form(gr, board, [asked], about)
    for opened in (page.load, tab.select):  # a run may have ended since the page was loaded
        opened(models, model, model, api_visibility="private", show_progress="hidden")
