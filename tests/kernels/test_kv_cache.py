"""The KV cache: prompts are copied into slots, and rows move, in every layer."""

import pytest
import torch
from torch import Tensor

from grpo.kernels import kv_cache
from grpo.kernels.kv_cache import SlotCache

LAYERS = [(2, 8, 8), (2, 8, 8), (1, 4, 4), (2, 8, 6), (2, 8, 8)]
"""Heads, size of a key's head, size of a value's head. The fourth layer has values of another size."""


def prompt_of(tokens: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(heads, tokens, size, generator=generator) for size in sizes)  # type: ignore[misc]
        for heads, *sizes in LAYERS
    ]


@pytest.mark.parametrize("at_once", [2**26, 1])
def test_rows_are_admitted_and_moved_in_every_layer(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "MOVED_BYTES", at_once)
    cache, first, second = SlotCache(5, 7, torch.float32), prompt_of(3, seed=1), prompt_of(4, seed=2)
    assert cache.bytes == 0
    cache.admit(0, first, 2)
    cache.admit(2, second, 3)
    cache.move(torch.tensor([0]), torch.tensor([4]), used=4)
    owners = [second, first, second, second, second]
    for layer in range(len(LAYERS)):
        for kind, slots in enumerate((cache.keys[layer], cache.values[layer])):
            for row, owner in enumerate(owners):
                wanted = owner[layer][kind]
                assert torch.equal(slots[row, :, : wanted.shape[1]], wanted)
                assert not slots[row, :, wanted.shape[1] :].any()
    numbers = sum(heads * (key_size + value_size) for heads, key_size, value_size in LAYERS)
    assert cache.numbers == 5 * 7 * numbers and cache.bytes == 4 * cache.numbers


def test_layers_of_one_shape_share_their_memory() -> None:
    cache = SlotCache(2, 3, torch.bfloat16)
    cache.admit(0, prompt_of(2, seed=1), 2)
    memory = [
        {tensors[layer].untyped_storage().data_ptr() for tensors in (cache.keys, cache.values)} for layer in range(5)
    ]
    assert memory[0] == memory[1] == memory[4] and len(memory[0]) == 1
    assert len(memory[3]) == 2 and memory[2] != memory[0]
    assert cache.keys[0].dtype == cache.values[3].dtype == torch.bfloat16
