"""Shared prompts: a split group with one computed prompt equals the unsplit group, and repeated prompts."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn

from grpo.config.parser import load_config
from grpo.config.schema import LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from grpo.kernels.attention import PackedLayout
from grpo.models.logprob_model import LogprobModel
from grpo.models.shared_prompt import KeptPrompt
from grpo.packing import PackedBatch, pack
from grpo.policy import Policy
from grpo.trainer import train
from grpo.types import Group
from tests.fakes import group, tiny_folder, tiny_model, use_slow_varlen
from tests.test_trainer import arguments

LENGTHS = [(6, [4, 9, 1, 7, 3]), (2, [3, 2]), (7, [5, 8, 2, 9, 9])]
"""Prompt and completion lengths. In rows of 24 tokens, the first group is split in two; the second goes whole beside
the rest of it, and the first part of the third.
"""
NARROW = 24
TOKENS = sum(prompt + sum(lengths) for prompt, lengths in LENGTHS)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps the precision of the first Accelerator for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def groups_of(vocabulary: int = 40) -> list[Group]:
    torch.manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(2, vocabulary, (length,)).tolist()

    return [group(draw, ids(prompt), [ids(n) for n in lengths]) for draw, (prompt, lengths) in enumerate(LENGTHS)]


def batches_of(max_tokens: int, share: bool = False) -> list[PackedBatch]:
    groups = groups_of()
    advantages = torch.tensor([[0.5, -1.0, 2.0, 1.5, -0.7]] * len(groups))
    return pack(groups, advantages, max_tokens=max_tokens, share_prompts=share)


def learned(logprob_model: nn.Module, batches: list[PackedBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logprobs of all batches, and the gradient of the sum of advantage * logprob^2 by parameter."""
    logprobs = []
    for batch in batches:
        logprobs_N = logprob_model(batch)[0]
        (batch.advantages_N * logprobs_N.square()).sum().backward()
        logprobs.append(logprobs_N.detach())
    gradients = {name: p.grad.clone() for name, p in logprob_model.model.named_parameters() if p.grad is not None}
    logprob_model.model.zero_grad()
    return torch.cat(logprobs), gradients


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == expected.keys() and len(ours) > 0
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert float((ours[name] - gradient).abs().max()) <= tolerance * scale, name


def tokens_seen(model: nn.Module) -> list[int]:
    """Return a list that collects the number of tokens of every pass through the layers."""
    seen: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return seen


def test_which_spans_are_split() -> None:
    batches = batches_of(NARROW, share=True)
    parts = [[(span.split and span.split.parts, span.last) for span in batch.spans] for batch in batches]
    assert parts == [[(2, False)], [(2, True), (None, True), (3, False)], [(3, False)], [(3, True)]]
    assert batches[0].spans[0].split is batches[1].spans[0].split
    assert batches[1].spans[-1].split is not batches[1].spans[0].split
    for others in (batches_of(1000, share=True), batches_of(NARROW)):
        assert {(span.split, span.last) for batch in others for span in batch.spans} == {(None, True)}


@pytest.mark.parametrize(
    ("attention", "by_kernels"),
    [("one by one", False), ("padded", False), ("in one call", False), ("one by one", True)],
    ids=["as on a CPU", "padded", "in one call", "by kernels"],
)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("qwen3", {}),
        ("llama", {}),
        ("mistral", {"sliding_window": 4}),
        ("gemma3", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
    ids=["qwen2", "qwen2 with a window", "qwen3", "llama", "mistral with a window", "gemma3 with a window"],
)
def test_the_same_logprobs_and_gradients_as_in_one_batch_and_as_with_the_prompt_repeated(
    family: str, changes: dict, attention: str, by_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedLayout, "one_by_one", attention == "one by one")
    if attention == "in one call":
        use_slow_varlen(monkeypatch)
    model = tiny_model(family, spread=2.0, **changes)
    logprob_model = LogprobModel(model, uses_packed_attention=True, temperature=0.9, uses_kernels=by_kernels)
    whole, whole_gradients = learned(logprob_model, batches_of(1000))
    repeated, repeated_gradients = learned(logprob_model, batches_of(NARROW))
    ours, gradients = learned(logprob_model, batches_of(NARROW, share=True))
    for expected, expected_gradients in ((whole, whole_gradients), (repeated, repeated_gradients)):
        assert torch.allclose(ours, expected, atol=1e-5)
        assert_same(gradients, expected_gradients)


def test_a_window_hides_the_start_of_the_prompt() -> None:
    """Check that the windows above are narrower than the sequences: without them the numbers differ."""
    scorers = [
        LogprobModel(tiny_model(spread=2.0, **changes), uses_packed_attention=True, temperature=1.0)
        for changes in ({}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1})
    ]
    with torch.no_grad():
        wide, narrow = (
            torch.cat([logprob_model(batch)[0] for batch in batches_of(NARROW)]) for logprob_model in scorers
        )
    assert float((wide - narrow).abs().max()) > 0.01


def test_what_goes_through_the_model_and_that_nothing_is_left() -> None:
    model = tiny_model(spread=2.0)
    logprob_model, seen = LogprobModel(model, uses_packed_attention=True, temperature=1.0), tokens_seen(model)
    repeated, shared = batches_of(NARROW), batches_of(NARROW, share=True)
    learned(logprob_model, repeated)
    assert seen == [20, 23, 22, 16, 16] and sum(seen) == TOKENS + 6 + 2 * 7
    seen.clear()
    learned(logprob_model, shared)  # a row of at most 24; before it, without a graph, the prompt of a group that begins
    assert seen == [6, 21, 7, 21, 19, 16] and sum(seen) == TOKENS + 6 + 7
    seen.clear()
    with torch.no_grad():
        backwards = torch.cat([logprob_model(batch)[0] for batch in shared[::-1]][::-1])
        assert seen == [16, 19, 21, 21] and sum(seen) == TOKENS
        assert torch.allclose(backwards, torch.cat([logprob_model(batch)[0] for batch in shared]), atol=1e-5)
        assert torch.allclose(backwards, torch.cat([logprob_model(batch)[0] for batch in repeated]), atol=1e-5)
    assert not logprob_model.prompts._open
    logprob_model(shared[0])
    logprob_model.prompts.forget()
    with pytest.raises(AssertionError, match="the last part of a group"):
        logprob_model(shared[1])


def test_scoring_in_between_changes_nothing() -> None:
    logprob_model = LogprobModel(tiny_model(spread=2.0), uses_packed_attention=True, temperature=1.0)
    batches = batches_of(NARROW, share=True)
    expected, expected_gradients = learned(logprob_model, batches)

    def forward(self: LogprobModel, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            LogprobModel.forward(self, batch)
        return LogprobModel.forward(self, batch)

    logprob_model.forward = forward.__get__(logprob_model)  # type: ignore[method-assign]
    ours, gradients = learned(logprob_model, batches)
    assert torch.equal(ours, expected)
    assert_same(gradients, expected_gradients)


def test_rows_hold_the_budget_and_batches_stay_complete() -> None:
    model = tiny_model(spread=2.0)
    shared, whole = batches_of(NARROW, share=True), batches_of(1000)[0]
    for name in ("tokens_N", "advantages_N", "sampling_logprobs_N", "weights_N", "lengths_S"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in shared]), getattr(whole, name))
    with torch.no_grad():
        ours = torch.cat(
            [LogprobModel(model, uses_packed_attention=True, temperature=1.0)(batch)[0] for batch in shared]
        )
        rows = torch.cat(
            [LogprobModel(model, uses_packed_attention=False, temperature=1.0)(batch)[0] for batch in shared]
        )
    assert torch.allclose(ours, rows, atol=1e-5)
    for tokens in range(16, 60):  # whatever the budget
        batches = batches_of(tokens, share=True)
        assert torch.equal(torch.cat([batch.tokens_N for batch in batches]), whole.tokens_N)
        for batch in batches:
            elsewhere = sum(span.prompt_length for span in batch.spans if span.split and not span.last)
            assert len(batch.input_ids_T) - elsewhere <= tokens
        spans = [span for batch in batches for span in batch.spans]
        for split in {span.split for span in spans if span.split}:
            assert [span.last for span in spans if span.split is split] == [False] * (split.parts - 1) + [True]


def policy_of(folder: Path, precision: str = "no", lora: list[str] | None = None, **model: object) -> Policy:
    return Policy(
        Accelerator(cpu=True, mixed_precision=precision),
        str(folder),
        ModelConfig(name=str(folder), **model),  # type: ignore[arg-type]
        ObjectiveConfig(beta=0.04),
        OptimizerConfig(learning_rate=0.01),
        LoraConfig(r=4, target_modules=lora) if lora else None,
        temperature=1.0,
        optimizer_steps=10,
    )


def accumulated(policy: Policy, batches: list[PackedBatch]) -> dict[str, Tensor]:
    for index, batch in enumerate(batches):
        with policy.accumulate(sync=index == len(batches) - 1):
            policy.backward((batch.advantages_N * policy.logprobs(batch)[0]).sum())
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return found


@pytest.mark.parametrize("lora", [None, ["all-linear"], ["q_proj"], ["v_proj", "lm_head"]], ids=str)
def test_through_a_policy_and_its_reference(
    tmp_path: Path, lora: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(tiny_folder(tmp_path / "model"), lora=lora)
    assert policy.shares_prompts
    wide, narrow = batches_of(1000), batches_of(NARROW, share=True)
    for _ in range(2):  # the second time with weights that have moved, and an adapter that is not 0
        expected = accumulated(policy, wide)
        assert_same(accumulated(policy, narrow), expected)
        references = [torch.cat(policy.reference_logprobs(batches)) for batches in (wide, narrow)]  # type: ignore[arg-type]
        assert torch.allclose(*references, atol=1e-5)
        policy.backward((narrow[0].advantages_N * policy.logprobs(narrow[0])[0]).sum())
        policy.step()
    assert not policy.logprob_model.prompts._open  # of the group that was left halfway


def test_the_reference_computes_the_prompt_once(tmp_path: Path) -> None:
    policy = policy_of(tiny_folder(tmp_path / "model"))
    assert policy.reference is not None
    seen = tokens_seen(policy.reference.model)
    policy.reference_logprobs(batches_of(NARROW, share=True))
    assert sum(seen) == TOKENS


def test_under_autocast(tmp_path: Path) -> None:
    """In bfloat16 the order of sums differs; the result is as close to float32 as with repeated prompts."""
    folder, narrow = tiny_folder(tmp_path / "model"), batches_of(NARROW)
    exact = accumulated(policy_of(folder), narrow)
    AcceleratorState._reset_state(reset_partial_state=True)
    policy = policy_of(folder, "bf16")
    ours = accumulated(policy, batches_of(NARROW, share=True))
    repeated = accumulated(policy, narrow)

    def distance(found: dict[str, Tensor]) -> float:
        return sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5

    assert 0 < distance(ours) < 1.5 * distance(repeated)
    assert distance(ours) < 0.05 * sum(float(gradient.square().sum()) for gradient in exact.values()) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.01])
def test_a_run_learns_the_same(tmp_path: Path, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:

    def weights(name: str, tokens: int, **more: object) -> dict[str, Tensor]:
        changes = {
            "objective.num_iterations": 2,
            "seed": 1,
            "objective.beta": beta,
            "data.max_prompt_length": 16,
        } | more
        settings = arguments(tmp_path, name, steps=2, tokens_per_batch=tokens, eval_every=0, **changes)
        return load_file(train(load_config(settings)) / "final" / "model.safetensors")

    rejoined = []
    rejoin = KeptPrompt.rejoin

    def counted(prompt: KeptPrompt) -> Callable[[Tensor, Tensor], None]:
        rejoined.append(prompt)
        return rejoin(prompt)

    monkeypatch.setattr(KeptPrompt, "rejoin", counted)
    wide = weights("wide", 1024)
    checkpointed = weights("checkpointed", 24, **{"model.gradient_checkpointing": True})
    assert not rejoined
    narrow = weights("narrow", 24)
    assert len(rejoined) >= 2 * 2  # a group in each iteration of each step, at the least
    for key in wide:
        # AdamW divides rounding by rounding where a gradient is all but 0: what is added to all keys of a sequence
        # hardly changes what they attend to, and a token that is seen once hardly changes the loss.
        close = 1e-4 if key.endswith(("k_proj.bias", "embed_tokens.weight")) else 1e-5
        assert torch.allclose(wide[key], narrow[key], atol=close)
        assert torch.allclose(checkpointed[key], narrow[key], atol=close)
