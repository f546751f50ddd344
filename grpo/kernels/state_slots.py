"""States of recurrent layers for decoding: one slot per row, like the KV cache, but of a fixed size."""

from torch import Tensor

States = dict[int, tuple[Tensor, Tensor]]
"""Index of a layer -> its last inputs of the convolution [rows, window - 1, E] and its recurrent state [rows, ...]."""


class StateSlots:
    """States of all slots. Rows 0 .. `active` - 1 are active."""

    def __init__(self, slots: int):
        self.slots, self.active = slots, 0
        self.layers: States = {}
        self.prompts: States = {}
        """Result of the last prefill: one row per prompt."""

    def collect(self, layer: int, convolution: Tensor, recurrent: Tensor) -> None:
        """Keep one layer's states at the end of prompts. The first call for a layer allocates its slots."""
        self.prompts[layer] = (convolution, recurrent)
        if layer not in self.layers:
            new = [part.new_zeros(self.slots, *part.shape[1:]) for part in (convolution, recurrent)]
            self.layers[layer] = (new[0], new[1])

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the states of the active rows of one layer, as views."""
        convolution, recurrent = self.layers[layer]
        return convolution[: self.active], recurrent[: self.active]

    def of_prompt(self, row: int) -> States:
        """Return the states of one prompt of the last prefill."""
        return {layer: (a[row].clone(), b[row].clone()) for layer, (a, b) in self.prompts.items()}

    def tensors(self) -> list[Tensor]:
        """Return the states of all slots and layers."""
        return [part for pair in self.layers.values() for part in pair]

    def admit(self, first_slot: int, states: States, samples: int) -> None:
        """Copy the states of one prompt into `samples` slots from `first_slot` on."""
        for layer, pair in states.items():
            for slots, part in zip(self.layers[layer], pair, strict=True):
                slots[first_slot : first_slot + samples] = part

    def move(self, targets: Tensor, sources: Tensor) -> None:
        """Copy rows `sources` to rows `targets`."""
        for tensor in self.tensors():
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    @property
    def numbers(self) -> int:
        """Number of elements of the states of one slot."""
        return sum(tensor[:1].numel() for tensor in self.tensors())
