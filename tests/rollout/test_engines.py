import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from grpo.errors import ConfigError
from grpo.models.logprob_model import LogprobModel
from grpo.packing import pack
from grpo.rewards.xml_format import TAGS, _is_xml_format
from grpo.rollout.engine import build_engine, completion_text, hidden_token_ids
from grpo.types import Prompt, SamplingPlan
from tests.fakes import FAMILIES, CharTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("way")

ONCE_IN_1000 = [10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3, 26.1, 27.9, 29.6, 31.3]
"""Values of chi-square with 1, 2, ... degrees of freedom that are exceeded with probability 0.001."""


def prompts() -> list[Prompt]:
    torch.manual_seed(3)
    return [Prompt(i, "text", tuple(torch.randint(2, 40, (n,)).tolist())) for i, n in enumerate((5, 9, 1, 14, 7))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_native_equals_transformers(family: str, temperature: float) -> None:
    model = tiny_model(family)
    plan = SamplingPlan(4, 12, temperature, seed=7)
    native = build_engine("native", model, CharTokenizer(), slots=6, uses_packed_attention=True).generate(
        prompts(), plan
    )
    oracle = build_engine("transformers", model, CharTokenizer(), slots=6, uses_packed_attention=True).generate(
        prompts(), plan
    )
    for mine, theirs in zip(native, oracle, strict=True):
        for a, b in zip(mine.completions, theirs.completions, strict=True):
            assert a.token_ids == b.token_ids
            assert a.ended == b.ended
            assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)


@pytest.mark.parametrize(
    "limits",
    [
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 1.3, "top_k": 5, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2},
    ],
    ids=["greedy", "sampled"],
)
def test_native_equals_transformers_with_other_distributions(limits: dict[str, float]) -> None:
    """Completions wait for slots, and rows move between them: the tokens that a row has seen move along."""
    model, plan = tiny_model(), SamplingPlan(4, 12, seed=7, **limits)
    assert plan.is_restricted and not SamplingPlan(4, 12, 1.0, seed=7).is_restricted
    native, oracle = (
        build_engine(engine, model, CharTokenizer(), slots=6, uses_packed_attention=True).generate(prompts(), plan)
        for engine in ("native", "transformers")
    )
    plain = build_engine("native", model, CharTokenizer(), slots=6, uses_packed_attention=True).generate(
        prompts(), SamplingPlan(4, 12, limits["temperature"], seed=7)
    )
    for mine, theirs in zip(native, oracle, strict=True):
        for a, b in zip(mine.completions, theirs.completions, strict=True):
            assert a.token_ids == b.token_ids
            assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)
    assert [c.token_ids for g in native for c in g.completions] != [c.token_ids for g in plain for c in g.completions]


def test_completions_do_not_depend_on_slots_or_neighbours() -> None:
    model, plan = tiny_model(), SamplingPlan(3, 10, 1.0, seed=1)
    wide = build_engine("native", model, CharTokenizer(), slots=64, uses_packed_attention=True).generate(
        prompts(), plan
    )
    narrow = build_engine("native", model, CharTokenizer(), slots=2, uses_packed_attention=True).generate(
        prompts(), plan
    )
    alone = build_engine("native", model, CharTokenizer(), slots=64, uses_packed_attention=True).generate(
        prompts()[2:3], plan
    )
    ids = [[c.token_ids for c in group.completions] for group in wide]
    assert ids == [[c.token_ids for c in group.completions] for group in narrow]
    assert ids[2] == [c.token_ids for c in alone[0].completions]


def test_the_end_token_is_kept_and_ends_the_completion() -> None:
    groups = build_engine("native", tiny_model(), CharTokenizer(), slots=64, uses_packed_attention=True).generate(
        prompts(), SamplingPlan(16, 30, 1.0, seed=2)
    )
    completions = [completion for group in groups for completion in group.completions]
    assert any(completion.ended for completion in completions)
    for completion in completions:
        assert (completion.token_ids[-1] == 0) == completion.ended
        assert 0 not in completion.token_ids[:-1]
        assert len(completion.token_ids) == len(completion.logprobs) <= 30


def special_tokenizer() -> PreTrainedTokenizerFast:
    """40 tokens: <end>, <pad>, <bos>, the four tags as special tokens, letters."""
    words = ["<end>", "<pad>", "<bos>", *TAGS, *(chr(97 + number) for number in range(33))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<end>",
        pad_token="<pad>",
        bos_token="<bos>",
        extra_special_tokens=list(TAGS),
    )


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_tags_that_are_special_tokens_stay_in_the_text(engine: str) -> None:
    """Only end, padding and bos tokens are left out."""
    tokenizer = special_tokenizer()
    assert set(TAGS) <= set(tokenizer.all_special_tokens)
    plan = SamplingPlan(16, 30, 1.0, seed=2)
    groups = build_engine(engine, tiny_model(spread=2.0), tokenizer, slots=64, uses_packed_attention=True).generate(
        prompts()[:2], plan
    )
    completions = [completion for group in groups for completion in group.completions]
    for completion in completions:
        words = tokenizer.convert_ids_to_tokens(completion.token_ids)
        assert completion.text == "".join(word for word in words if word not in ("<end>", "<pad>", "<bos>"))
    assert {tag for tag in TAGS if any(tag in completion.text for completion in completions)} == set(TAGS)


def test_a_perfect_answer_in_special_tokens_is_right() -> None:
    tokenizer = special_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["<bos>", TAGS[0], "a", TAGS[1], TAGS[2], "b", TAGS[3], "<end>"])
    text = completion_text(ids, hidden_token_ids([0], tokenizer), tokenizer)
    assert text == "<reasoning>a</reasoning><answer>b</answer>" and _is_xml_format(text)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_sampling_and_training_logprobs_are_the_same(temperature: float) -> None:
    model = tiny_model()
    plan = SamplingPlan(4, 12, temperature, seed=5)
    groups = build_engine("native", model, CharTokenizer(), slots=8, uses_packed_attention=True).generate(
        prompts(), plan
    )
    batch = pack(groups, torch.ones(len(groups), 4), max_tokens=10_000)[0]
    with torch.no_grad():
        trained = LogprobModel(model, uses_packed_attention=True, temperature=temperature)(batch)[0]
    assert torch.allclose(trained, batch.sampling_logprobs_N, atol=1e-4)


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_groups_are_handed_out_as_soon_as_they_are_whole(engine: str) -> None:
    early: list = []
    built = build_engine(engine, tiny_model(), CharTokenizer(), slots=3, uses_packed_attention=True)
    groups = built.generate(prompts(), SamplingPlan(4, 12, 1.0, seed=7), finished=early.append)
    assert sorted(g.prompt.draw for g in early) == [g.prompt.draw for g in groups]
    assert all(any(g is group for group in groups) for g in early)


def test_the_cache_leaves_room_for_the_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free without 144 bytes for each token: (9 x 6144 - 6 x 10 x 144) / 2 / 6144 = 3.8 completions."""
    monkeypatch.setattr("grpo.runtime.device.available_memory", lambda: 9 * 6144)
    engine = build_engine("native", tiny_model(), CharTokenizer(), slots=64, uses_packed_attention=True)
    cache, _ = engine._memory(completions=6, prompt=14, draws=10)
    assert cache.slots == 3


def test_the_cache_keeps_to_its_budget() -> None:
    model, plan = tiny_model(), SamplingPlan(3, 10, 1.0, seed=1)
    wide = build_engine("native", model, CharTokenizer(), slots=64, uses_packed_attention=True)
    # 2 layers x 2 heads x 8 numbers x (key, value) = 64 numbers of 4 bytes; 14 + 10 positions: 6144 bytes a completion
    assert wide.position_numbers == 64
    assert wide.slots_that_fit(15, 24, free=2 * 6144 * 4) == 4  # half of what is free
    assert wide.slots_that_fit(15, 24, free=2**40) == 15
    narrow = build_engine(
        "native", model, CharTokenizer(), slots=64, uses_packed_attention=True, cache_gib=2.5 * 6144 / 2**30
    )
    assert narrow.slots_that_fit(15, 24, free=2**40) == 2
    ids = [[[c.token_ids for c in group.completions] for group in e.generate(prompts(), plan)] for e in (wide, narrow)]
    assert ids[0] == ids[1]
    none = build_engine("native", model, CharTokenizer(), slots=64, uses_packed_attention=True, cache_gib=6143 / 2**30)
    with pytest.raises(ConfigError, match="raise rollout.cache_gib, or lower sampling.max_completion_length"):
        none.generate(prompts(), plan)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_frequencies_follow_the_model(family: str) -> None:
    """First and second tokens of many completions are distributed like the model's probabilities."""
    model, count = tiny_model(family, vocab_size=12, spread=2.0), 4000
    prompt = prompts()[0]
    prompt = Prompt(0, "text", tuple(token % 12 for token in prompt.token_ids))
    plan = SamplingPlan(count, 2, 1.3, seed=11)
    group = build_engine("native", model, CharTokenizer(), slots=1000, uses_packed_attention=True).generate(
        [prompt], plan
    )[0]
    model.set_attn_implementation("sdpa")
    first = torch.tensor([completion.token_ids[0] for completion in group.completions])
    for after in (None, int(first[first != 0].mode().values)):
        ids = torch.tensor([[*prompt.token_ids, *([] if after is None else [after])]])
        with torch.no_grad():
            p = torch.softmax(model(ids, use_cache=False).logits[0, -1] / 1.3, -1)
        drawn = [c.token_ids for c in group.completions if after is None or c.token_ids[0] == after]
        seen = torch.bincount(torch.tensor([row[-1 if after is not None else 0] for row in drawn]), minlength=12)
        expected = len(drawn) * p
        rare = expected < 5  # the test wants at least 5 expected in each class: the rare ones are one
        seen, expected = (torch.cat([part[~rare], part[rare].sum()[None]]) for part in (seen, expected))
        kept = expected > 0
        chi_square = float(((seen - expected)[kept] ** 2 / expected[kept]).sum())
        assert chi_square < ONCE_IN_1000[int(kept.sum()) - 2], (family, after)
