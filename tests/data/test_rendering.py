"""Chat templates: settings, system messages that a template refuses or drops, dates, and text that it leaves out."""

import dataclasses
import json
import logging
from typing import Any

import pytest

from grpo.config.schema import DataConfig
from grpo.data import rendering
from grpo.data.mapped import map_prompts, mapped_folder
from grpo.data.rendering import check_template_kwargs, prompt_token_ids, prompts_token_ids, render_prompts
from grpo.data.rows import load_examples
from grpo.data.streaming import StreamedPrompts
from grpo.errors import ConfigError
from grpo.types import Message
from tests.data.test_stream import CHAT, make_tokenizer, words

TURNS = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS
DROPS = "{% for m in messages if m.role != 'system' %}{{ m.role }} {{ m.content }} {% endfor %}"
THINKS = TURNS + "{% if not enable_thinking | default(true) %}is{% endif %}"


@pytest.fixture(autouse=True)
def forget() -> None:
    rendering._system_in_user_turn.clear()
    rendering._compared.clear()


@pytest.mark.parametrize(
    ("template", "said"),
    [(REFUSES, "refuses a system message (no system role)"), (DROPS, "leaves out the system message")],
)
def test_the_system_text_goes_into_the_first_question(
    template: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer(template)
    turns: list[Message] = [*CHAT, {"role": "assistant", "content": "2"}, {"role": "user", "content": "what"}]
    with caplog.at_level(logging.WARNING):
        assert words(prompt_token_ids(CHAT, tokenizer)) == "user be brief what is 2"
        assert words(prompt_token_ids(turns, tokenizer)) == "user be brief what is 2 assistant 2 user what"
        assert words(prompts_token_ids([CHAT[1:], CHAT], tokenizer)[0]) == "user what is 2"
    [message] = caplog.messages
    assert message == f"the model's chat template {said}: its text is put before the first question"
    assert CHAT[0]["role"] == "system"  # the caller's messages stay as they are


def test_settings_of_a_template_reach_every_way_of_rendering(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path))
    tokenizer, off = make_tokenizer(THINKS), {"enable_thinking": False}
    assert words(prompt_token_ids(CHAT[1:], tokenizer)) == "user what is 2"
    rows = [{"question": "what is 2", "answer": "#### 2"}]
    rows.append({**rows[0], "chat_template_kwargs": {"enable_thinking": True}})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=str(tmp_path / "a.jsonl"), system_prompt=None, chat_template_kwargs=off)
    examples = load_examples(data, "train", 0)
    rendered, _ = render_prompts(examples, tokenizer, None)
    assert [words(prompt.token_ids) for prompt in rendered] == ["user what is 2 is", "user what is 2"]
    folder = mapped_folder(data, tokenizer)
    assert folder != mapped_folder(DataConfig(path=data.path, system_prompt=None), tokenizer)
    assert list(map_prompts(folder, examples, tokenizer, None, [])) == rendered
    streamed = StreamedPrompts(dataclasses.replace(data, shuffle_buffer=1), tokenizer, 0)
    assert [streamed.take(0, 1)[0].token_ids for _ in range(1)] == [rendered[0].token_ids]


@pytest.mark.parametrize("key", ["enable_thinkin", "tokenize"])
def test_a_setting_that_the_template_does_not_read_is_refused(key: str) -> None:
    check_template_kwargs(make_tokenizer(THINKS), {"enable_thinking": True})
    with pytest.raises(ConfigError, match=f"does not read '{key}'; it reads enable_thinking"):
        check_template_kwargs(make_tokenizer(THINKS), {key: True})


def test_dates_are_the_same_on_every_day() -> None:
    template = "{{ strftime_now('%d %b %Y') }} " + TURNS
    assert words(prompt_token_ids(CHAT[1:], make_tokenizer(template))) == "26 Jul 2024 user what is 2"
    dated = "{{ date_string }} " + TURNS
    assert words(prompt_token_ids(CHAT[1:], make_tokenizer(dated), {"date_string": "brief"})) == "brief user what is 2"


def test_text_that_a_template_leaves_out_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    strips = "{% for m in messages %}{{ m.role }} {{ m.content.split('</think>')[-1] }} {% endfor %}"
    shot: Message = {"role": "assistant", "content": "<think>is</think> 2"}
    chat: list[Message] = [CHAT[1], shot, CHAT[1]]
    for _ in range(2):
        prompt_token_ids(chat, make_tokenizer(strips))
    assert caplog.messages == [
        "the chat template changes or leaves out a part of a turn of the assistant: '<think>is</think> 2'"
    ]


def test_the_tokenizer_of_mistral_common_renders_without_a_template() -> None:
    class MistralCommonBackend:
        chat_template, bos_token_id = None, 1

        def apply_chat_template(self, chats: Any, **given: Any) -> list[list[int]]:
            assert given == {
                "add_generation_prompt": True, "continue_final_message": False, "tokenize": True, "return_dict": False
            }  # fmt: skip
            return [[1, 3, len(chat), 4] for chat in chats]

    assert prompt_token_ids(CHAT, MistralCommonBackend()) == [1, 3, 2, 4]
