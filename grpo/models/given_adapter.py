"""An adapter that exists: a peft.PeftModel in memory -> its base model and weights -> the adapter that is trained.

Training makes its own adapter in the base model (lora.py), from the same settings, and starts from these weights.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.errors import ConfigError
from grpo.models.lora import ADAPTER_NAME, Adapter, lora_layers


@dataclass
class GivenAdapter:
    """The adapter of a loaded model. Its layers leave the base model when training builds its own."""

    model: Adapter
    name: str
    """Its name in `model`."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Copies of its weights, under the names of the trained adapter, once it was taken off."""

    @property
    def base(self) -> PreTrainedModel:
        """The base model, in which the layers are."""
        return self.model.get_base_model()

    def take_off(self) -> dict[str, Tensor]:
        """Remove the layers from the base model and return their weights; on a further call the weights alone."""
        if not self.weights:
            if any(layer.merged for _, layer in lora_layers(self.base)):
                self.model.unmerge_adapter()
            self.weights = {
                name.replace(f".{self.name}.", f".{ADAPTER_NAME}.").removesuffix(
                    f".{self.name}"
                ): value.detach().clone()
                for name, value in self.base.named_parameters()
                if ".lora_" in name
            }
            self.model.unload()
        return self.weights


_given: dict[str, GivenAdapter] = {}
"""Path of a model in memory -> the adapter that it has."""


@contextlib.contextmanager
def given_adapter(path: str, adapter: GivenAdapter) -> Iterator[None]:
    """Let the model in memory that `path` stands for start with this adapter within."""
    _given[path] = adapter
    try:
        yield
    finally:
        del _given[path]


def take_given_adapter(path: str) -> dict[str, Tensor]:
    """Return the weights of the adapter that the model `path` came with, which is no longer in it; {} without one."""
    return _given[path].take_off() if path in _given else {}


@torch.no_grad()
def load_given_adapter(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Copy the weights into the adapter of `model`.

    Raises:
        ConfigError: That adapter has other layers.
    """
    own = {name: value for name, value in model.named_parameters() if ".lora_" in name}
    different = sorted(own.keys() ^ weights.keys())
    if different:
        raise ConfigError(
            f"model has an adapter with {len(weights)} weights, of which a new one with its settings has others "
            f"({different[0]}): merge it (merge_and_unload), and pass peft_config for a new adapter"
        )
    for name, value in own.items():
        value.copy_(weights[name])
