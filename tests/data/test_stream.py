"""The stream: prompts rendered once, by template or plainly, and an order that depends on the counts alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo.config.schema import DataConfig
from grpo.data.rendering import prompt_token_ids, prompts_token_ids, render_prompts, template_arguments
from grpo.data.rows import Example, load_examples
from grpo.data.stream import PromptStream
from grpo.errors import ConfigError
from grpo.rewards.signature import column_arguments
from grpo.types import Completion, Group, Prompt, question_of

WORDS = [
    "<bos>",
    "<eos>",
    "<unk>",
    "be",
    "brief",
    "what",
    "is",
    "2",
    "user",
    "system",
    "assistant",
    "26",
    "Jul",
    "2024",
]
TEMPLATE = (
    "{{ bos_token }}{{ date_string if date_string is defined else 'no' }} "
    "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 2"}]


def make_tokenizer(chat_template: str | None) -> Any:
    """A tokenizer of whole words that adds <bos> and <eos> to a text, as some real tokenizers do."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = chat_template
    return fast


def words(token_ids: Any) -> str:
    return " ".join(WORDS[token_id] for token_id in token_ids)


def test_a_chat_prompt_is_the_template_with_one_bos_and_a_fixed_date() -> None:
    token_ids = prompt_token_ids(CHAT, make_tokenizer(TEMPLATE))
    assert words(token_ids) == "<bos> 26 Jul 2024 system be brief user what is 2 assistant"


def test_a_doubled_bos_is_removed() -> None:
    token_ids = prompt_token_ids(CHAT, make_tokenizer("{{ bos_token }}" + TEMPLATE))
    assert words(token_ids).count("<bos>") == 1


def test_without_a_template_the_prompt_is_plain() -> None:
    class Spy:
        chat_template = None
        bos_token_id = None

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            self.text = text
            return [1, 2]

    spy = Spy()
    assert prompt_token_ids(CHAT, spy) == [1, 2]
    assert spy.text == "be brief\n\nwhat is 2\n"
    shots = [CHAT[0], {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, CHAT[1]]
    prompt_token_ids(shots, spy)
    assert spy.text == "be brief\n\nq\na\n\nwhat is 2\n"


def test_plain_text_gets_one_bos_and_no_end() -> None:
    for template in (None, TEMPLATE):
        assert words(prompt_token_ids("what is 2", make_tokenizer(template))) == "<bos> what is 2"
        assert words(prompt_token_ids("<bos> what is 2", make_tokenizer(template))) == "<bos> what is 2"
    assert words(prompt_token_ids(CHAT, make_tokenizer(None))) == "<bos> be brief what is 2"


TOOLS = [{"type": "function", "function": {"name": "be"}}]
TEMPLATE_OF_TOOLS = (
    "{{ bos_token }}{% if tools %} {{ tools[0].function.name }}{% endif %}{% if brief %} brief{% endif %}"
    "{% for message in messages %} {{ message.role }} {{ message.content if message.content else '' }}"
    "{% for call in message.tool_calls or [] %} {{ call.name }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


def test_a_begun_answer_is_continued() -> None:
    """No end of turn and no new turn behind it, with one prompt and with many, with a template and without."""
    begun = [*CHAT, {"role": "assistant", "content": "2 is"}]
    template = TEMPLATE.replace("{{ message.content }} ", "{{ message.content }} <eos> ")
    for text in (template, None):
        tokenizer = make_tokenizer(text)
        one = prompt_token_ids(begun, tokenizer)
        assert words(one).endswith(f"what is 2 {'<eos> assistant ' if text else ''}2 is")
        assert prompts_token_ids([begun, CHAT], tokenizer) == [one, prompt_token_ids(CHAT, tokenizer)]


def test_rewards_see_the_whole_answer_that_a_prompt_began() -> None:
    begun = [*CHAT, {"role": "assistant", "content": "2 is"}]
    group = Group(Prompt(0, begun, (1,), {}), [Completion([1], [0.0], True, " what")])
    arguments = column_arguments(lambda completions, **_: [], [group], {})
    assert arguments["completions"] == [[{"role": "assistant", "content": "2 is what"}]]
    assert question_of(begun) == "what is 2" and question_of("text") == "text" and question_of(CHAT[:1]) == "be brief"


def test_tools_and_arguments_reach_the_template() -> None:
    tokenizer = make_tokenizer(TEMPLATE_OF_TOOLS)
    columns = {"tools": TOOLS, "chat_template_kwargs": {"brief": True, "other": None}}
    examples = [Example(CHAT, columns), Example(CHAT, {"chat_template_kwargs": None, "tools": ["a", "b"]})]
    prompts, _ = render_prompts(examples, tokenizer, None)
    assert words(prompts[0].token_ids) == "<bos> be brief system be brief user what is 2 assistant"
    assert words(prompts[1].token_ids) == "<bos> system be brief user what is 2 assistant"
    arguments = [template_arguments(example.columns) for example in examples]
    assert prompts_token_ids([CHAT, CHAT], tokenizer, arguments) == [list(prompt.token_ids) for prompt in prompts]
    for given, message in [
        ("{}", "'chat_template_kwargs' is '{}', it must be a mapping or null"),
        ({"tokenize": False}, "'chat_template_kwargs' has 'tokenize', which the trainer sets: remove it"),
    ]:
        with pytest.raises(ConfigError, match=message):
            template_arguments({"chat_template_kwargs": given})
    with pytest.raises(ConfigError, match="the model has no chat template that could read them"):
        prompt_token_ids(CHAT, make_tokenizer(None), {"tools": TOOLS})


def test_messages_keep_what_the_template_reads(tmp_path: Path) -> None:
    """Tool calls and names stay; a prompt cannot end in a tool call."""
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "be"}]}
    told = {"role": "tool", "name": "be", "content": "2"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": [CHAT[1], called, told]}) + "\n")
    data = DataConfig(path=str(path), name="question_answer")
    [example] = load_examples(data, "train", 0)
    assert example.messages == [CHAT[1], {"role": "assistant", "tool_calls": [{"name": "be"}]}, told]
    ids = prompt_token_ids(example.messages, make_tokenizer(TEMPLATE_OF_TOOLS))
    assert words(ids) == "<bos> user what is 2 assistant be <unk> 2 assistant"
    assert example.columns["question"] == "what is 2"
    path.write_text(json.dumps({"prompt": [CHAT[1], called]}) + "\n")
    with pytest.raises(ConfigError, match=r"a.jsonl:1: the last message of column 'prompt' is a tool call"):
        load_examples(data, "train", 0)


def test_a_template_that_refuses_says_what_to_change() -> None:
    refusing = make_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(ConfigError, match="no system role.*data.system_prompt null"):
        prompt_token_ids(CHAT, refusing)


def test_render_prompts_leaves_out_long_ones_and_keeps_the_index() -> None:
    tokenizer = make_tokenizer(None)
    examples = [Example("2", {"answer": "2"}), Example("what is what is 2"), Example("is 2")]
    prompts, dropped = render_prompts(examples, tokenizer, 3)
    assert prompts == [Prompt(0, "2", (0, 7), {"answer": "2"}), Prompt(2, "is 2", (0, 6, 7), {})]
    assert dropped == 1
    assert render_prompts(examples, tokenizer, None)[1] == 0
    with pytest.raises(ConfigError, match="max_prompt_length is 1, which leaves none of the 3.*shortest has 2 tokens"):
        render_prompts(examples, tokenizer, 1)
    with pytest.raises(ConfigError, match="no examples"):
        render_prompts([], tokenizer, 1)


def make_stream(size: int, seed: int) -> PromptStream:
    return PromptStream([Prompt(index, f"question {index}", (index,)) for index in range(size)], seed)


def test_every_epoch_holds_every_prompt_once_in_another_order() -> None:
    drawn = [prompt for step in range(25) for prompt in make_stream(50, 0).take(step, 4)]
    assert [prompt.draw for prompt in drawn] == list(range(100))
    first, second = ([prompt.messages for prompt in drawn[start : start + 50]] for start in (0, 50))
    assert sorted(first) == sorted(second) == sorted(f"question {index}" for index in range(50))
    assert first != second
    assert first != [prompt.messages for prompt in make_stream(50, 1).take(0, 50)]


def test_the_order_never_changes() -> None:
    # Golden: a resumed run must see the order that the interrupted one had, whatever the NumPy version.
    assert [prompt.token_ids[0] for prompt in make_stream(5, 42).take(0, 10)] == [1, 4, 3, 0, 2, 4, 3, 0, 2, 1]
    make_stream(5, -1).take(0, 5)


def test_a_step_is_the_same_whatever_came_before() -> None:
    used = make_stream(7, 3)
    for step in range(20):
        used.take(step, 3)
    assert used.take(5, 3) == make_stream(7, 3).take(5, 3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_a_step_between_them(world_size: int) -> None:
    whole = make_stream(5, 0).take(3, 6)
    for rank in range(world_size):
        assert make_stream(5, 0).take(3, 6, rank, world_size) == whole[rank::world_size]


def test_a_prompt_drawn_twice_in_a_step_has_two_identities() -> None:
    drawn = make_stream(1, 0).take(2, 2)
    assert [prompt.draw for prompt in drawn] == [4, 5]
    assert drawn[0].messages == drawn[1].messages


def test_drawing_does_not_touch_the_global_generators() -> None:
    import numpy
    import torch

    numpy.random.seed(0)
    torch.manual_seed(0)
    expected = (numpy.random.rand(), torch.rand(1).item())
    numpy.random.seed(0)
    torch.manual_seed(0)
    make_stream(50, 0).take(0, 10)
    assert (numpy.random.rand(), torch.rand(1).item()) == expected


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(ConfigError, match="no prompts"):
        PromptStream([], 0)
