"""RMSNorms of modules: which ones are recognized, and that the kernel computes what they do."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.kernels import registry
from grpo.kernels.cuda import norms as kernel
from grpo.kernels.head import IDENTITY
from grpo.models import norms
from grpo.models.architecture import text_decoder
from grpo.models.families import describe
from grpo.models.loading import prepare_model
from grpo.models.logprob_model import LogprobModel, probe_batch
from grpo.models.norms import OFFSET, use_grpo_norms
from tests.models.zoo import VOCABULARY, tiny_zoo_model

BATCH = probe_batch(VOCABULARY)
FAMILIES = {
    "gemma": (5, 1.0),
    "llama": (5, 0.0),
    "qwen3": (9, 0.0),
    "qwen3_5_text": (7, 1.0),  # and one with a gate
    "gemma4_text": (16, 0.0),  # and two without a weight
    "opt": (0, None),  # LayerNorm
}
"""Family -> RMSNorms that are recognized, and what they add to their weight."""


def with_random_norms(family: str) -> PreTrainedModel:
    model = tiny_zoo_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return prepare_model(model, IDENTITY)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let the kernel be used on this processor. Returns a list that gets the weight of each call."""
    calls: list[Tensor] = []

    def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        calls.append(weight)
        return kernel.rms_norm(hidden, weight, epsilon)

    monkeypatch.setattr(norms, "is_available", lambda hidden, weight: hidden.dtype == weight.dtype)
    monkeypatch.setattr(norms, "rms_norm", rms_norm)
    return calls


def logprobs_and_gradients(model: PreTrainedModel) -> list[Tensor]:
    """Return logprobs, and the gradient of each parameter. 0 stands for that of a parameter that has none."""
    probe = LogprobModel(model, uses_packed_attention=False, temperature=1.0, uses_kernels=False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logprobs = probe(BATCH.to(model.device))[0]
    gradients = torch.autograd.grad(logprobs.sum(), parameters, allow_unused=True)
    return [logprobs.detach(), *(torch.zeros(1) if gradient is None else gradient for gradient in gradients)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_computes_what_the_modules_do(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_random_norms(family)
    number, offset = FAMILIES[family]
    assert [vars(module)[OFFSET] for module in model.modules() if OFFSET in vars(module)] == [offset] * number
    expected = logprobs_and_gradients(model)
    calls = counted(monkeypatch)
    found = logprobs_and_gradients(model)
    assert len(calls) == number or family == "qwen3_5_text"  # whose layers run once for each sequence
    for mine, other in zip(found, expected, strict=True):
        assert float((mine - other).norm()) <= 1e-5 * float(other.norm().clamp(min=1e-6))


def test_on_this_processor_nothing_changes() -> None:
    model = with_random_norms("llama")
    patched = logprobs_and_gradients(model)
    for module in model.modules():
        vars(module).pop("forward", None)
    assert all(torch.equal(mine, own) for mine, own in zip(patched, logprobs_and_gradients(model), strict=True))


def test_a_copy_reads_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_random_norms("llama")
    copied = copy.deepcopy(model)
    calls = counted(monkeypatch)
    copied(torch.tensor([[1, 2, 3]]))
    own = {id(parameter) for parameter in copied.parameters()}
    assert len(calls) == 5 and all(id(weight) in own for weight in calls)


def test_recognized_norms_are_part_of_a_description_and_others_are_not() -> None:
    model = with_random_norms("llama")
    assert describe(model) is not None
    norm = text_decoder(model).norm
    vars(norm)[OFFSET] = 1.0
    assert describe(model) is None
    vars(norm)[OFFSET] = 0.0
    norm.forward = type(norm).forward.__get__(norm)  # of somebody else
    assert describe(model) is None


def test_a_model_without_memory_is_recognized_too() -> None:
    with torch.device("meta"):
        model = tiny_zoo_model("llama")
    assert use_grpo_norms(model) == 5


class AddsRMSNorm(nn.Module):
    """Not weight * x / rms(x), though its name says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, (4,), self.weight, self.eps) + hidden


class GatedRMSNorm(AddsRMSNorm):
    """Takes a second tensor."""

    def forward(self, hidden: Tensor, gate: Any = None) -> Tensor:
        return nn.functional.rms_norm(hidden, (4,), self.weight, self.eps) * (1 if gate is None else gate)


@pytest.mark.parametrize("kind", [AddsRMSNorm, GatedRMSNorm, nn.RMSNorm, nn.LayerNorm])
def test_other_modules_are_left_alone(kind: Any) -> None:
    assert use_grpo_norms(kind() if issubclass(kind, AddsRMSNorm) else kind(4)) == 0


@pytest.mark.parametrize(
    ("device", "dtypes", "used"),
    [
        ("cpu", (torch.float32, torch.float32), False),
        ("cuda", (torch.float32, torch.float32), True),
        ("cuda", (torch.bfloat16, torch.bfloat16), True),
        ("cuda", (torch.bfloat16, torch.float32), False),
    ],
    ids=str,
)
def test_where_it_is_used(
    device: str, dtypes: tuple[torch.dtype, torch.dtype], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        is_cuda = device == "cuda"

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    monkeypatch.setattr(registry, "_failed", {})
    assert kernel.is_available(*map(Fake, dtypes)) == used  # type: ignore[arg-type]
    monkeypatch.setenv("GRPO_KERNELS", "auto,-fused_norm")
    assert not kernel.is_available(*map(Fake, dtypes))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("family", [family for family, (number, _) in FAMILIES.items() if number])
def test_a_gpu_computes_what_the_modules_do(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_random_norms(family).cuda()
    found = logprobs_and_gradients(model)
    monkeypatch.setenv("GRPO_KERNELS", "auto,-fused_norm")
    for mine, other in zip(found, logprobs_and_gradients(model), strict=True):
        assert float((mine - other).norm()) <= 1e-4 * float(other.norm().clamp(min=1e-6))
