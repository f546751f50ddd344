from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grpo.kernels import head as module
from grpo.logprobs import token_logprobs

pytestmark = pytest.mark.usefixtures("way")


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_the_plain_softmax_in_values_and_gradients(monkeypatch, chunk_rows: int, temperature: float) -> None:
    torch.manual_seed(0)
    vocabulary, tokens, size = 50, 17, 8
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 4 * vocabulary * chunk_rows})
    hidden, head = torch.randn(tokens, size, requires_grad=True), torch.randn(vocabulary, size, requires_grad=True)
    targets, upstream = torch.randint(0, vocabulary, (tokens,)), torch.randn(tokens)

    plain = torch.log_softmax(hidden @ head.T / temperature, -1)
    expected = plain.gather(1, targets[:, None]).squeeze(1)
    gradients = torch.autograd.grad((expected * upstream).sum(), (hidden, head))
    got, entropy = token_logprobs(hidden, head, targets, temperature)
    ours = torch.autograd.grad((got * upstream).sum(), (hidden, head))

    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(entropy, -(plain.exp() * plain).sum(-1), atol=1e-5)
    for mine, theirs in zip(ours, gradients, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_no_tokens() -> None:
    got, entropy = token_logprobs(torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(0, dtype=torch.long))
    assert got.shape == entropy.shape == (0,)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropy_has_a_gradient_where_it_is_asked_for(monkeypatch, temperature: float) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 4 * 50 * 3})
    hidden, head = torch.randn(17, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets, first, second = torch.randint(0, 50, (17,)), torch.randn(17), torch.randn(17)
    plain = torch.log_softmax(hidden @ head.T / temperature, -1)
    loss = plain.gather(1, targets[:, None]).squeeze(1) @ first - (plain.exp() * plain).sum(-1) @ second
    expected = torch.autograd.grad(loss, (hidden, head))
    logprobs, entropies = token_logprobs(hidden, head, targets, temperature, entropy_gradient=True)
    got = torch.autograd.grad(logprobs @ first + entropies @ second, (hidden, head))
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
    assert not token_logprobs(hidden, head, targets, temperature)[1].requires_grad


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_all_logits_at_once_never_exist() -> None:
    """A loss and its gradients at a real vocabulary: 512 x 152k float32 logits would be 311 MB, and several times
    that with their softmax and gradient.
    """
    vocabulary, tokens, size = 152_000, 512, 16
    torch.manual_seed(0)
    hidden, head = torch.randn(tokens, size, requires_grad=True), torch.randn(vocabulary, size, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))

    def peak(loss: Callable[[], torch.Tensor]) -> float:
        """Return the peak of resident memory in MB above the value before."""
        hidden.grad = head.grad = None
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        loss().backward()
        return (resident("VmHWM") - before) / 1000

    def resident(key: str) -> int:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[key].split()[0])

    def ours() -> torch.Tensor:
        logprobs, entropies = token_logprobs(hidden, head, targets, 0.9, entropy_gradient=True)
        return (logprobs + 0.1 * entropies).sum()

    def plain() -> torch.Tensor:
        scores = torch.log_softmax(hidden @ head.T / 0.9, -1)
        return (scores.gather(1, targets[:, None]).squeeze(1) - 0.1 * (scores.exp() * scores).sum(-1)).sum()

    assert peak(ours) < 250  # chunks of 16 MiB and what is made of them, and a gradient of 10 MB
    assert peak(plain) > 600  # so the measure sees what it is for


@pytest.mark.parametrize(("entropy_gradient", "chunk_rows"), [(False, 3), (False, 100), (True, 3)])
@pytest.mark.parametrize(
    ("scale", "softcap", "has_bias"),
    [(0.25, None, False), (1.0, 2.0, False), (1.0, None, True), (0.5, 3.0, True), (4.0, None, True)],
    ids=["scale", "softcap", "bias", "all", "scale and bias"],
)
def test_scale_softcap_and_bias_of_the_logits(
    monkeypatch: pytest.MonkeyPatch,
    scale: float,
    softcap: float | None,
    has_bias: bool,
    chunk_rows: int,
    entropy_gradient: bool,
) -> None:
    torch.manual_seed(0)
    vocabulary, tokens, size, temperature = 150, 17, 8, 0.7
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 4 * vocabulary * chunk_rows})
    hidden, head = torch.randn(tokens, size, requires_grad=True), torch.randn(vocabulary, size, requires_grad=True)
    bias = torch.randn(vocabulary, requires_grad=True) if has_bias else None
    targets, first, second = torch.randint(vocabulary, (tokens,)), torch.randn(tokens), torch.randn(tokens)
    logits = hidden @ head.T if bias is None else hidden @ head.T + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    plain = torch.log_softmax(logits / temperature, -1)
    expected = plain.gather(1, targets[:, None]).squeeze(1)
    expected_entropies = -(plain.exp() * plain).sum(-1)
    got, entropies = token_logprobs(
        hidden,
        head,
        targets,
        temperature,
        bias_V=bias,
        transform=module.LogitTransform(scale, softcap),
        entropy_gradient=entropy_gradient,
    )
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(entropies, expected_entropies, atol=1e-5)
    leaves = [hidden, head] if bias is None else [hidden, head, bias]
    tolerance = 1e-5 * max(1.0, scale / temperature)  # logits, and with them their rounding errors, grow by the scale
    loss, ours = expected @ first, got @ first
    if entropy_gradient:
        loss, ours = loss + expected_entropies @ second, ours + entropies @ second
    for mine, theirs in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(loss, leaves), strict=True):
        assert torch.allclose(mine, theirs, atol=5 * tolerance)
