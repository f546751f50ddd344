"""launch/train.py in which layers of one rank run out of memory: OOM="RANK:WHERE:TOKENS[:CALLS]".

Calls of the last layer with more than TOKENS tokens raise torch.OutOfMemoryError, as an allocator would within it:
WHERE is forward, backward, or reference for any forward pass. The first CALLS of them do not.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn

from grpo.config.parser import load_config
from grpo.models.strategies.base import Strategy
from grpo.runtime.command import run_main

MESSAGE = "CUDA out of memory. Tried to allocate 1.00 GiB"


def limit_memory(model: nn.Module, where: str, tokens: int, calls: int) -> None:
    """Let the last layer of `model` raise, in training only."""
    seen = 0

    def allocate(states: Tensor) -> None:
        nonlocal seen
        if states.shape[1] > tokens:
            seen += 1
            if seen > calls:
                raise torch.OutOfMemoryError(MESSAGE)

    def forward(module: nn.Module, inputs: Any, output: Any) -> None:
        if where == "reference" or (where == "forward" and torch.is_grad_enabled()):
            allocate(inputs[0])

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, states: Tensor) -> Tensor:
            return states.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            allocate(gradient)
            return gradient

    def insert(module: nn.Module, inputs: Any) -> Any:
        return (Backward.apply(inputs[0]), *inputs[1:])

    layer = model.get_submodule("model.layers")[-1]  # type: ignore[index]
    layer.register_forward_hook(forward)
    if where == "backward":
        layer.mlp.register_forward_pre_hook(insert)


def main() -> None:
    rank, where, tokens, *calls = os.environ["OOM"].split(":")
    if os.environ.get("RANK", "0") == rank:
        prepare = Strategy.prepare

        def limited(self: Strategy, logprob_model: Any, optimizer: Any) -> nn.Module:
            limit_memory(logprob_model.model, where, int(tokens), int(calls[0]) if calls else 0)
            return prepare(self, logprob_model, optimizer)

        Strategy.prepare = limited  # type: ignore[method-assign]
    from grpo.trainer import train

    train(load_config())


if __name__ == "__main__":
    run_main(main)
