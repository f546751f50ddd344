"""KV cache for decoding: a fixed number of slots, allocated once, each row at its own position.

keys[layer], values[layer]    [slots, K, length, D] in one dtype. They are parts of one tensor for all layers of equal
shape, so that a few copies admit a prompt or move a row in every layer
"""

import torch
from torch import Tensor

from grpo.kernels.state_slots import States, StateSlots

MOVED_BYTES = 2**26
"""Maximum size of the copy of the rows that `SlotCache.move` makes at a time, or one layer's if that is larger."""


class SlotCache:
    """Keys and values of all slots. Rows 0 .. B-1 are active: the engine keeps them contiguous.

    Models that decode with their own modules use it as a transformers Cache (`update`). While `prefilling` is set,
    nothing is stored: the keys and values that the layers compute are collected in `prompt`.
    """

    def __init__(self, slots: int, length: int, dtype: torch.dtype = torch.float32):
        self.slots, self.length, self.dtype = slots, length, dtype
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._joint: dict[int, Tensor] = {}
        """Layer -> its keys and values in one tensor, [2, slots, K, length, D]."""
        self._blocks: list[tuple[list[int], Tensor]] = []
        """Layers, and their keys and values in one tensor, [layers, 2, slots, K, length, D]."""
        self._moved: list[Tensor] = []
        """All memory: the blocks, and [layers, slots, K, length, D] where values have another head size than keys."""
        self.prompt: list[tuple[Tensor, Tensor]] = []
        """Result of the last prefill: keys and values [prompts, K, tokens, D] per layer."""
        self.prompt_lengths: list[int] = []
        """Number of tokens of each prompt of a prefill."""
        self.prefilling = False
        self.zeroed = True
        """Allocate zeros, since masked attention must not read a NaN at positions that were never written."""
        self.places = torch.empty(0, dtype=torch.long)
        """[B] position at which the next token of each active row is written."""
        self.active = self.longest = 0
        self.states = StateSlots(slots)
        """States of recurrent layers. Empty for a model without them."""
        self._numbered: dict[int, int] = {}

    @property
    def numbers(self) -> int:
        """Number of elements of all keys and values."""
        return sum(tensor.numel() for tensor in (*self.keys, *self.values))

    @property
    def bytes(self) -> int:
        """Size of all keys, values and states in bytes."""
        tensors = (*self.keys, *self.values, *self.states.tensors())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def aim(self, positions_B: Tensor, longest: int) -> None:
        """Set the positions of the next step: row b writes at positions_B[b] and reads the first `longest` ones."""
        self.active, self.longest, self.places = len(positions_B), longest, positions_B
        self.states.active = self.active
        self._flat: dict[int, Tensor] = {}

    def collect(self, key: Tensor, value: Tensor) -> None:
        """Collect one layer's keys and values of prompts, [prompts, K, tokens, D]."""
        self.prompt.append((key, value))

    def _allocate(self, prompt: list[tuple[Tensor, Tensor]]) -> None:
        """Allocate the slots of all layers. `prompt` is that of `admit`."""
        shapes: dict[tuple[int, ...], list[int]] = {}
        for layer, (key, value) in enumerate(prompt):
            shapes.setdefault((key.shape[0], key.shape[2], value.shape[2]), []).append(layer)
        parts: dict[int, tuple[Tensor, Tensor]] = {}
        for (heads, key_size, value_size), layers in shapes.items():
            empty = prompt[layers[0]][0]
            allocate = empty.new_zeros if self.zeroed else empty.new_empty
            if key_size == value_size:
                shape = (len(layers), 2, self.slots, heads, self.length, key_size)
                block = allocate(shape, dtype=self.dtype)
                self._blocks.append((layers, block))
                self._moved.append(block)
                self._joint.update(zip(layers, block, strict=True))
                parts.update((layer, (block[row, 0], block[row, 1])) for row, layer in enumerate(layers))
            else:  # values have another head size than keys
                sizes = ((self.slots, heads, self.length, size) for size in (key_size, value_size))
                keys, values = (allocate((len(layers), *shape), dtype=self.dtype) for shape in sizes)
                self._moved += [keys, values]
                parts.update(zip(layers, zip(keys, values, strict=True), strict=True))
        self.keys, self.values = ([parts[layer][kind] for layer in range(len(prompt))] for kind in (0, 1))

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one new token per active row, [B, K, D].

        Returns:
            The keys and values to attend to, [B, K, longest, D] each.
        """
        heads = key.shape[1]
        if heads not in self._flat:  # one copy of contiguous pieces per layer
            rows = torch.arange(self.active * heads, device=key.device).view(self.active, heads)
            self._flat[heads] = (rows * self.length + self.places[:, None]).flatten()
        for cache, new in ((self.keys[layer], key), (self.values[layer], value)):
            cache.flatten(0, 2).index_copy_(0, self._flat[heads], new.flatten(0, 1).to(cache.dtype))
        return self._seen(layer)

    def write_joint(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Same as `write` for keys and values side by side, [B, 2 K, D], in one copy."""
        joint = self._joint[layer]
        heads = joint.shape[2]
        if -heads not in self._flat:
            kind = torch.arange(2, device=new.device)[:, None] * self.slots  # keys, then values
            row = torch.arange(self.active, device=new.device)[:, None, None] + kind
            head = row * heads + torch.arange(heads, device=new.device)
            self._flat[-heads] = (head * self.length + self.places[:, None, None]).flatten()
        joint.flatten(0, 3).index_copy_(0, self._flat[-heads], new.flatten(0, 1).to(joint.dtype))
        return self._seen(layer)

    def _seen(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer][: self.active, :, : self.longest], self.values[layer][: self.active, :, : self.longest]

    def admit(
        self, first_slot: int, prompt: list[tuple[Tensor, Tensor]], samples: int, states: States | None = None
    ) -> None:
        """Copy one prompt into `samples` slots from `first_slot` on. The first call allocates all slots.

        Args:
            first_slot: the first slot.
            prompt: keys and values per layer, [K, tokens, D] each.
            samples: number of slots.
            states: states of recurrent layers at the end of the prompt.
        """
        self.states.admit(first_slot, states or {}, samples)
        if not self.keys:
            self._allocate(prompt)
        slots = slice(first_slot, first_slot + samples)
        for layers, block in self._blocks:
            new = torch.stack([part for layer in layers for part in prompt[layer]]).unflatten(0, (len(layers), 2))
            block[:, :, slots, :, : new.shape[3]] = new[:, :, None]
        for layer, (key, value) in enumerate(prompt):
            if layer not in self._joint:
                self.keys[layer][slots, :, : key.shape[1]] = key
                self.values[layer][slots, :, : value.shape[1]] = value

    def move(self, targets: Tensor, sources: Tensor, used: int) -> None:
        """Copy the first `used` positions of rows `sources` to rows `targets`, on the device of the cache."""
        self.states.move(targets, sources)
        for tensor in self._moved:
            rows = tensor.ndim - 4
            bytes_per_layer = tensor[0].nbytes // (self.slots * self.length) * used * len(sources)
            for part in tensor.narrow(-2, 0, used).split(max(1, MOVED_BYTES // bytes_per_layer)):
                part.index_copy_(rows, targets, part.index_select(rows, sources))

    # Interface of a transformers Cache, called by attention layers.

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Store key and value [B, K, T, D] and return the keys and values to attend to, [B, K, L, D]."""
        if self.prefilling:
            self._numbered[layer] = len(self.prompt)  # other layers may have no attention
            self.collect(key, value)
            return key, value
        return self.write(self._numbered[layer], key[:, :, 0], value[:, :, 0])

    @property
    def is_initialized(self) -> bool:
        return not self.prefilling

    def get_seq_length(self, *_: object) -> int:
        return 0  # positions are always given explicitly
