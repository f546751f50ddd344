"""Hybrid models through the native engine: equal to plain rows without a cache, whatever the number of slots."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from grpo.kernels.sampling import draw_tokens
from grpo.models.logprob_model import use_grpo_attention
from grpo.rollout.engine import build_engine
from grpo.rollout.sampling import counted_uniform, stream_key
from grpo.types import Group, Prompt, SamplingPlan
from tests.fakes import CharTokenizer
from tests.hybrids import families, hybrid

PLAN = SamplingPlan(3, 10, 1.0, seed=5)
ENDS = list(range(8))
"""One token in five ends a completion, so that rows leave at different times."""


def prompts() -> list[Prompt]:
    torch.manual_seed(3)
    return [Prompt(i, "text", tuple(torch.randint(2, 40, (n,)).tolist())) for i, n in enumerate((5, 1, 7))]


def decoded(model: PreTrainedModel, slots: int) -> list[Group]:
    engine = build_engine("native", model, CharTokenizer(), slots=slots, uses_packed_attention=True)
    return engine.generate(prompts(), PLAN)


@torch.no_grad()
def sampled_without_cache(model: PreTrainedModel, prompt: Prompt, sample: int) -> tuple[list[int], list[float]]:
    """Sample one completion from whole forward passes of transformers' own modules."""
    ids, logprobs = list(prompt.token_ids), []
    key = torch.tensor([stream_key(PLAN.seed, prompt.draw, sample)])
    for position in range(PLAN.max_completion_length):
        logits = model(torch.tensor([ids]), use_cache=False).logits[:, -1]
        token, logprob = draw_tokens(logits, counted_uniform(key, torch.tensor([position])), PLAN.temperature)
        ids.append(int(token))
        logprobs.append(float(logprob))
        if ids[-1] in ENDS:
            break
    return ids[len(prompt.token_ids) :], logprobs


@families
def test_native_equals_plain_rows(family: str) -> None:
    """With slots for all and with 4, where rows leave, move and join while others decode."""
    model = hybrid(family)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = ENDS
    plain = [[sampled_without_cache(model, prompt, s) for s in range(PLAN.num_generations)] for prompt in prompts()]
    assert len({len(tokens) for group in plain for tokens, _ in group}) > 2
    assert use_grpo_attention(model)
    for slots in (64, 4):
        for group, expected in zip(decoded(model, slots), plain, strict=True):
            for completion, (tokens, logprobs) in zip(group.completions, expected, strict=True):
                assert completion.token_ids == tokens
                assert torch.allclose(torch.tensor(completion.logprobs), torch.tensor(logprobs), atol=1e-5)


class SizesFromValues(TorchDispatchMode):
    """Counts operations whose result has a size that depends on values: a GPU makes the host wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        masks = args[1] if packet is torch.ops.aten.index else []
        if packet in (torch.ops.aten.nonzero, torch.ops.aten.masked_select) or any(
            isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_prefill_has_no_size_that_depends_on_values() -> None:
    model = hybrid("lfm2")
    assert use_grpo_attention(model)
    with SizesFromValues() as watched:
        decoded(model, 64)
    assert watched.found == []
    with SizesFromValues() as watched:
        torch.ones(2)[torch.tensor([True, False])]
    assert watched.found == ["aten.index.Tensor"]
