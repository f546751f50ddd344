"""Conversations with tools in the vocabulary and the chat template of SmolLM2 itself, from its GGUF file.

`grpo fetch smollm2` downloads the file.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import get_json_schema

from grpo.data.gguf import plain_model
from grpo.data.rendering import apply_template, prompt_token_ids
from grpo.data.tokenizer import load_tokenizer
from grpo.models.loading import load_model
from grpo.models.logprob_model import LogprobModel, use_grpo_attention
from grpo.packing import pack
from grpo.rollout.dialogue import Turns
from grpo.rollout.engine import build_engine, saved_end_ids
from grpo.rollout.turn_rounds import with_turns
from grpo.turns.calculator import calculator
from grpo.turns.template import TurnTemplate
from grpo.turns.workers import TurnWorkers
from grpo.types import Message, Prompt, SamplingPlan
from tests.rollout.test_turns import Echo

FILE = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
pytest.importorskip("gguf")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE.is_file(), reason=f"there is no {FILE.name} in models/: grpo fetch smollm2"),
]
END = 2
SETTINGS = {"chat_template_kwargs": {"tools": [get_json_schema(calculator)]}}
CALL = '<tool_call>[{"name": "calculator", "arguments": {"expression": "EXPRESSION"}}]</tool_call>'


@cache
def folder() -> str:
    return plain_model(str(FILE))


@cache
def tokenizer() -> Any:
    return load_tokenizer(folder())


def ids_of(text: str) -> list[int]:
    return list(tokenizer()(text, add_special_tokens=False)["input_ids"])


def rendered(messages: list[Message]) -> list[int]:
    return prompt_token_ids(messages, tokenizer(), SETTINGS["chat_template_kwargs"])


@pytest.mark.parametrize(
    "expressions",
    [["6*7"], ["740 * 49", "1/3"], ["2**64", "1/0", "(17+5)*3"]],
    ids=["one call", "two calls", "an error between"],
)
def test_ids_of_a_dialogue_are_those_of_one_rendering(expressions: list[str]) -> None:
    ends = saved_end_ids(folder(), tokenizer())
    assert ends == [END] and TurnTemplate(tokenizer(), ends).ends == ["<|im_end|>"]
    for role in ("tool", "user"):
        TurnTemplate(tokenizer(), ends).check(role, SETTINGS["chat_template_kwargs"])
    turns = Turns(tokenizer(), ends, TurnWorkers({"calculator": calculator}, workers=0))
    user = {"role": "user", "content": "How much is it? ½ + 💡, “exactly”."}
    prompt = Prompt(0, [user], tuple(rendered([user])), SETTINGS)
    dialogue = turns.dialogue(prompt, 0, 0, 1)
    ids: list[int] = []
    chat: list[Message] = [user]
    for expression in expressions:
        text = CALL.replace("EXPRESSION", expression)
        ids += [*ids_of(text), END]
        assert dialogue.end_turn(ids, True)
        ids += dialogue.continuation(ids, 1000)
        chat += [{"role": "assistant", "content": text}, dialogue.messages[-1]]
    ids += [*ids_of("That is it."), END]
    assert not dialogue.end_turn(ids, True)
    chat += [{"role": "assistant", "content": "That is it."}, {"role": "user", "content": "Thanks."}]
    whole = rendered(chat)
    built = [*prompt.token_ids, *ids]
    assert whole[: len(built)] == built
    assert tokenizer().decode(whole[len(built) :]) == "\n<|im_start|>user\nThanks.<|im_end|>\n<|im_start|>assistant\n"
    given = [tokenizer().decode(ids[start:end]) for start, end in dialogue.given]
    results = [message["content"] for message in dialogue.messages if message["role"] == "tool"]
    assert given == [f"\n<|im_start|>tool\n{result}<|im_end|>\n<|im_start|>assistant\n" for result in results]
    assert dialogue.calls == len(expressions) and dialogue.failures == expressions.count("1/0")


def test_tokens_that_were_sampled_stay_although_the_tokenizer_would_join_them() -> None:
    """Letter by letter: a text has one rendering, and many ways to be sampled."""
    turns = Turns(tokenizer(), [END], TurnWorkers({"calculator": calculator}, workers=0))
    user = {"role": "user", "content": "6*7?"}
    dialogue = turns.dialogue(Prompt(0, [user], tuple(rendered([user])), SETTINGS), 0, 0, 1)
    text = CALL.replace("EXPRESSION", "6*7")
    letters = [i for letter in text for i in ids_of(letter)]
    assert len(letters) == len(text) > len(ids_of(text))
    ids = [*letters, END]
    assert dialogue.end_turn(ids, True)
    given = dialogue.continuation(ids, 1000)
    assert ids == [*letters, END] and tokenizer().decode(given).startswith("\n<|im_start|>tool\n42<|im_end|>")
    assert dialogue.messages[0]["content"] == text and dialogue.given == [[len(ids), len(ids) + len(given)]]


def test_what_the_model_samples_over_turns_is_what_is_trained() -> None:
    """The model itself, with an environment that answers every turn: logprobs, ids, and the text of the template."""
    model = load_model(folder())
    use_grpo_attention(model)
    inner = build_engine("native", model, tokenizer(), slots=8, uses_packed_attention=True)
    workers = TurnWorkers(environment=Echo, workers=0)
    engine = with_turns(inner, Turns(tokenizer(), [END], workers, has_environment=True))
    chats = [[{"role": "user", "content": text}] for text in ("Say hi.", "What is 2+2? Answer with a number.")]
    ids = [tuple(prompt_token_ids(chat, tokenizer(), {})) for chat in chats]
    prompts = [Prompt(n, chat, own) for n, (chat, own) in enumerate(zip(chats, ids, strict=True))]
    groups = engine.generate(prompts, SamplingPlan(3, 150, 1.0, 1))
    [batch] = pack(groups, max_tokens=10**6)
    with torch.no_grad():
        logprobs = LogprobModel(model, uses_packed_attention=True, temperature=1.0)(batch)[0]
    torch.testing.assert_close(batch.sampling_logprobs_N, logprobs, atol=5e-4, rtol=0)
    assert sum(len(completion.given) for group in groups for completion in group.completions) >= 4
    for group in groups:
        for completion in group.completions:
            messages = [{"role": m["role"], "content": m["content"]} for m in completion.turns["messages"]]
            [text] = apply_template([[*group.prompt.messages, *messages]], tokenizer(), {}, tokenize=False)
            assert text.startswith(tokenizer().decode([*group.prompt.token_ids, *completion.token_ids]))
