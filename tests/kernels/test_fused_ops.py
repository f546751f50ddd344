"""RMSNorm and SwiGLU by hand: the same values and gradients as the model's own, and nothing else touched."""

import copy

import pytest
import torch
from grpo.kernels.cpu.decoder_layer import use_lean_layers
from grpo.kernels.cpu.gemm import Linear

from grpo.kernels.cpu.fused_ops import MLP, Norm
from tests.fakes import tiny_model

pytestmark = pytest.mark.usefixtures("way")


def test_a_norm_of_two_numbers() -> None:
    norm = torch.nn.Module()
    norm.weight, norm.variance_epsilon = torch.nn.Parameter(torch.tensor([1.0, 2.0])), 0.0
    norm.__class__ = Norm
    # rms(3, 4) = sqrt(12.5) = 3.5355
    assert torch.allclose(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.848528, 2.262742]]))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_and_learns_the_same(family: str, dtype: torch.dtype) -> None:
    plain = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in plain.named_parameters():
        if "norm" in name:  # 1 everywhere would hide a weight that is left out
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    lean = copy.deepcopy(plain)
    use_lean_layers(lean)
    assert any(isinstance(module, Norm) for module in lean.modules())
    assert any(isinstance(module, MLP) for module in lean.modules())
    ids = torch.randint(0, plain.config.vocab_size, (2, 9), generator=generator)
    outputs = []
    for model in (plain, lean):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(ids).logits
        logits.float().log_softmax(-1)[..., 3].sum().backward()
        outputs.append(logits)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    assert torch.allclose(*outputs, **close)
    for (name, one), two in zip(plain.named_parameters(), lean.parameters(), strict=True):
        scale = float(one.grad.abs().max())
        assert float((one.grad - two.grad).abs().max()) <= max(close["atol"] * scale, 1e-6), name


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5, 6)])
def test_gradients_equal_finite_differences(shape: tuple[int, ...]) -> None:
    from grpo.kernels.cpu.fused_ops import _SwiGLU

    torch.manual_seed(0)
    gate, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(_SwiGLU.apply, (gate, up))


def test_other_families_keep_their_own_norms_and_mlps() -> None:
    model = tiny_model("gemma3")
    before = [type(module) for module in model.modules()]
    use_lean_layers(model)
    for module, kind in zip(model.modules(), before, strict=True):
        assert type(module) is (Linear if kind is torch.nn.Linear else kind)
