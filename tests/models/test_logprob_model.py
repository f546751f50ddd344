"""The gather of the hidden states that predict completions: the backward pass is deterministic."""

import torch

from grpo.models.logprob_model import LogprobModel
from grpo.packing import pack
from tests.fakes import group, tiny_model


def test_gradients_are_equal_to_the_bit_each_time() -> None:
    """Many completions share the last token of their prompt, with enough numbers for two threads."""
    model = tiny_model("llama", hidden_size=256, head_dim=64)
    batch = pack([group(0, [5] * 9, [[7 + index % 9] * 9 for index in range(48)])], torch.ones(1, 48), max_tokens=9999)[
        0
    ]
    assert len(batch.tokens_N) * 256 > 32768  # below, torch works with one thread
    logprob_model = LogprobModel(model, uses_packed_attention=True, temperature=1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        gradients = []
        for _ in range(10):
            model.zero_grad()
            (logprob_model(batch)[0] * torch.linspace(0.1, 1.7, len(batch.tokens_N))).sum().backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])
