"""Recurrent layers on packed rows: logprobs and gradients equal those of plain rows, and no state crosses sequences."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from grpo.kernels import recurrent
from grpo.models.logprob_model import LogprobModel, use_grpo_attention
from grpo.models.mixers import KINDS, use_grpo_mixers
from tests.hybrids import HYBRIDS, families, hybrid
from tests.models.test_shared_prompt import NARROW, batches_of, learned


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let prompts of 6 and completions of 9 tokens have several chunks, the last of them shorter."""
    monkeypatch.setattr(recurrent, "CHUNK", 4)
    yield


def test_every_kind_of_layer_has_a_model() -> None:
    built = {type(module).__name__ for family in HYBRIDS for module in hybrid(family).modules()}
    assert set(KINDS) <= built


@families
def test_packed_equals_plain_rows(family: str) -> None:
    """Once in one row, once with the groups split over rows that share their prompts."""
    model = hybrid(family)
    plain = learned(LogprobModel(model, uses_packed_attention=False, temperature=0.9), batches_of(10_000))
    assert use_grpo_attention(model)
    ours = LogprobModel(model, uses_packed_attention=True, temperature=0.9)
    for batches in (batches_of(10_000), batches_of(NARROW), batches_of(NARROW, share=True)):
        logprobs, gradients = learned(ours, batches)
        assert torch.allclose(logprobs, plain[0], atol=1e-5)
        assert gradients.keys() == plain[1].keys()
        for name, gradient in plain[1].items():
            assert float((gradients[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


@families
def test_no_state_leaks_into_another_completion(family: str) -> None:
    """Other tokens in the first prompt and its first completion change nothing after them, to the bit."""
    model = hybrid(family)
    assert use_grpo_attention(model)
    ours = LogprobModel(model, uses_packed_attention=True, temperature=1.0)
    [batch] = batches_of(10_000)

    def logprobs(change: slice) -> Tensor:
        ids = batch.input_ids_T.clone()
        ids[change] = (ids[change] + 1) % 40
        with torch.no_grad():
            return ours(replace(batch, input_ids_T=ids))[0]

    before = logprobs(slice(0, 0))
    prompt, first = batch.spans[0].prompt_length, batch.spans[0].completion_lengths[0]
    changed = logprobs(slice(0, prompt)) != before
    own = sum(batch.spans[0].completion_lengths)
    assert changed[:own].all() and not changed[own:].any()
    changed = logprobs(slice(prompt, prompt + first)) != before
    assert changed[1:first].all() and not changed[first:].any()


@families
def test_a_deep_copy_has_its_own_layers(family: str) -> None:
    """The frozen reference is a deep copy: its forward functions must not read the weights of the policy."""
    model = hybrid(family)
    assert use_grpo_mixers(model)
    twin = copy.deepcopy(model)
    owners = [module.forward.__self__ is module for module in twin.modules() if type(module).__name__ in KINDS]
    assert owners and all(owners)
