"""Several turns: what is sampled is what is trained, id for id, with and without the cache of earlier turns."""

import asyncio

import pytest
import torch

from grpo.models.logprob_model import LogprobModel
from grpo.models.padded_rows import pack_rows
from grpo.packing import pack
from grpo.rollout import native_engine
from grpo.rollout.dialogue import Turns
from grpo.rollout.engine import build_engine, end_token_ids
from grpo.rollout.turn_rounds import TurnRounds, with_turns
from grpo.turns.environment import StepResult
from grpo.turns.workers import TurnWorkers
from grpo.types import Completion, Group, Message, Prompt, SamplingPlan
from tests.fakes import tiny_model
from tests.rollout.turns_tokenizer import char_tokenizer

PLAN = SamplingPlan(4, 60, 1.0, seed=5)
ENDS = [0, *range(8, 102, 20)]


class Echo:
    """Answers a turn with its length, three times at most."""

    def __init__(self, turns: int = 3):
        self.left, self.total = turns, 0

    def reset(self, prompt: Prompt) -> list[Message] | None:
        return None

    async def step(self, completion: str) -> StepResult:
        await asyncio.sleep(0)
        self.left -= 1
        self.total += len(completion)
        return [{"role": "user", "content": f"{len(completion)} <end>"}], float(self.total), self.left == 0


def engine_with_turns(engine: str = "native", slots: int = 5, family: str = "qwen2", **kwargs: bool):
    tokenizer = char_tokenizer()
    model = tiny_model(family, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = ENDS  # many of them, so that most turns of a random model end
    built = build_engine(engine, model, tokenizer, slots=slots, uses_packed_attention=True, engine_kwargs=kwargs)
    workers = TurnWorkers(environment=Echo, workers=0)
    return model, with_turns(built, Turns(tokenizer, end_token_ids(model, tokenizer), workers, has_environment=True))


def prompts() -> list[Prompt]:
    tokenizer = char_tokenizer()
    texts = ["what?", "how much is it?", "go", "a long question " * 3]
    chats = [[{"role": "user", "content": text}] for text in texts]
    rendered = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    return [Prompt(i, chat, tuple(ids)) for i, (chat, ids) in enumerate(zip(chats, rendered, strict=True))]


def ids_of(groups: list[Group]) -> list[list[int]]:
    return [completion.token_ids for group in groups for completion in group.completions]


def check_exact(model: torch.nn.Module, groups: list[Group]) -> None:
    """Sampled logprobs are those of training, and the given tokens are those of the template."""
    tokenizer = char_tokenizer()
    [batch] = pack(groups, max_tokens=10**6)
    logprobs = LogprobModel(model, uses_packed_attention=True, temperature=1.0)(batch)[0]
    assert torch.allclose(logprobs, batch.sampling_logprobs_N, atol=2e-4)
    for completion in (completion for group in groups for completion in group.completions):
        turns = [m for m in completion.turns["messages"] if m["role"] == "assistant"]
        assert len(completion.token_ids) == len(completion.logprobs) <= PLAN.max_completion_length
        assert sum(m["tokens"] for m in turns) == len(completion.sampled)
        assert len(completion.given) <= len(turns) <= 3
        begin = 0
        for number, (start, end) in enumerate(completion.given):
            sampled = completion.token_ids[begin:start]
            assert [i in ENDS for i in sampled] == [False] * (len(sampled) - 1) + [True]  # the end token is trained
            shown = tokenizer.decode([i for i in sampled if i > 1 and i not in ENDS])
            length = len(shown)
            given = tokenizer.decode(completion.token_ids[start:end])
            assert given == f"\n<user>{length} < end><end>\n<assistant>"  # a result cannot end its own turn
            assert turns[number]["content"] == shown
            assert completion.logprobs[start:end] == [0.0] * (end - start)
            begin = end
        assert completion.text == turns[-1]["content"]


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
def test_what_is_sampled_is_what_is_trained(family: str) -> None:
    model, engine = engine_with_turns(family=family)
    groups = engine.generate(prompts(), PLAN)
    check_exact(model, groups)
    completions = [completion for group in groups for completion in group.completions]
    assert {len(completion.given) for completion in completions} >= {1, 2}
    assert {completion.ended for completion in completions} == {True, False}
    for completion in completions:
        if completion.turns["reward"] is not None and completion.ended:
            assert completion.turns["reward"] == sum(
                len(m["content"]) for m in completion.turns["messages"] if m["role"] == "assistant"
            )


def test_the_cache_of_earlier_turns_changes_nothing_but_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    _, kept = engine_with_turns()
    _, mixed = engine_with_turns()
    _, again = engine_with_turns(keep_turns=False)
    groups = kept.generate(prompts(), PLAN)
    assert ids_of(groups) == ids_of(again.generate(prompts(), PLAN))
    monkeypatch.setattr(native_engine, "FORCED_TOKENS", 13)  # some results are longer
    assert ids_of(groups) == ids_of(mixed.generate(prompts(), PLAN))
    assert kept.prefilled_tokens < mixed.prefilled_tokens < again.prefilled_tokens
    prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts())
    given = sum(end - start for group in groups for c in group.completions for start, end in c.given)
    assert kept.prefilled_tokens == prompt_tokens + given
    contexts = sum(
        len(group.prompt.token_ids) + end for group in groups for c in group.completions for _, end in c.given
    )
    assert again.prefilled_tokens == prompt_tokens + contexts > 2 * kept.prefilled_tokens


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_completions_do_not_depend_on_slots(slots: int) -> None:
    _, engine = engine_with_turns(slots=slots)
    _, other = engine_with_turns(slots=5)
    assert ids_of(engine.generate(prompts(), PLAN)) == ids_of(other.generate(prompts(), PLAN))


def test_rounds_around_another_engine_are_exact() -> None:
    model, engine = engine_with_turns("transformers")
    assert isinstance(engine, TurnRounds)
    finished: list[Group] = []
    groups = engine.generate(prompts(), SamplingPlan(2, 40, 1.0, seed=5), finished.append)
    assert finished == groups
    check_exact(model, groups)
    assert any(completion.given for group in groups for completion in group.completions)


def test_given_tokens_are_context_and_not_in_the_loss() -> None:
    """prompt [5 6], completion [7 0 | 8 9 | 7 0]: the given 8 9 are read, and neither predicted nor counted."""
    completion = Completion([7, 0, 8, 9, 7, 0], [-1.0, -2.0, 0.0, 0.0, -3.0, -4.0], True, "", given=[[2, 4]])
    plain = Completion([7, 3], [-5.0, -6.0], True, "")
    assert completion.sampled == [0, 1, 4, 5]
    group = Group(Prompt(0, "", (5, 6)), [completion, plain])
    [batch] = pack([group], torch.tensor([[2.0, -1.0]]), max_tokens=100)
    assert batch.input_ids_T.tolist() == [5, 6, 7, 0, 8, 9, 7, 0, 7, 3]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 2, 3]
    assert batch.predictor_N.tolist() == [1, 2, 5, 6, 1, 8]
    assert batch.tokens_N.tolist() == [7, 0, 7, 0, 7, 3]
    assert batch.sampling_logprobs_N.tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    assert batch.lengths_S.tolist() == [4, 2]
    assert batch.advantages_N.tolist() == [2.0] * 4 + [-1.0] * 2
    # Two ways: packed, and as padded rows.
    model = tiny_model()
    packed = LogprobModel(model, uses_packed_attention=True, temperature=1.0)(batch)[0]
    assert batch.rows()[0].tolist() == [[5, 6, 7, 0, 8, 9, 7, 0], [5, 6, 7, 3, 0, 0, 0, 0]]
    assert batch.rows()[1].tolist() == [1, 2, 5, 6, 9, 10]
    rows = LogprobModel(model, uses_packed_attention=False, temperature=1.0)(batch)[0]
    assert torch.allclose(packed, rows, atol=1e-4)
    [padded] = pack_rows([group], max_tokens=100)
    assert padded.predictor_N.tolist() == batch.predictor_N.tolist()
    # The given tokens are context: another one changes what follows, and nothing before it.
    other = Completion([7, 0, 8, 11, 7, 0], completion.logprobs, True, "", given=[[2, 4]])
    [changed] = pack([Group(group.prompt, [other, plain])], max_tokens=100)
    after = LogprobModel(model, uses_packed_attention=True, temperature=1.0)(changed)[0]
    assert torch.equal(after[[0, 1, 4, 5]], packed[[0, 1, 4, 5]]) and not torch.allclose(after[2], packed[2], atol=1e-3)
